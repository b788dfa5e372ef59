// The conversation that is shown: its messages, and the replies on their way, also of those that are not shown.

import { byId } from "./dom.js";
import { ReplyView, userMessage } from "./message_view.js";
import { emptyReply, Reply, serverMessages } from "./reply.js";
import { nameChat } from "./store.js";

const NEAR_PX = 80; // so near to the end, the view follows it
const SAVE_MS = 2000; // while a reply comes

export class ChatView {
  /**
   * `attachments`: the images for the next message. `settings()` returns {system, body}; `askKey(why)` lets the reader
   * type a key; `changed()` is called after each change, `failed(error)` after each failure.
   */
  constructor({ store, attachments, settings, askKey, changed, failed }) {
    this._store = store;
    this._attachments = attachments;
    this._settings = settings;
    this._askKey = askKey;
    this._changed = changed;
    this._failed = failed;
    this._running = new Map(); // conversation -> its Reply
    this._dropped = new WeakSet(); // conversations that were deleted
    this._views = [];
    this._follows = true; // the end of the conversation, as long as it is in view
    this._log = byId("log");
    this._input = byId("input");
    this._latest = byId("to-latest");
    this._prepare();
  }

  get chat() {
    return this._chat;
  }

  /** Return the ids of conversations with a reply on its way. */
  busy() {
    return new Set([...this._running.keys()].map(({ id }) => id));
  }

  /** Show a conversation from its end. */
  show(chat) {
    this._chat = chat;
    this._follows = true;
    this._draw();
  }

  /** End the reply of this conversation, if there is one. */
  stop(chat = this._chat) {
    this._running.get(chat)?.stop();
  }

  /** Forget a conversation that the reader deletes, and its reply. */
  drop(chat) {
    this._dropped.add(chat);
    this.stop(chat);
    this._store.remove(chat.id);
  }

  _prepare() {
    const form = byId("composer");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this._send();
    });
    this._input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this._send();
      }
    });
    this._input.addEventListener("input", () => this._fitInput());
    byId("stop").addEventListener("click", () => {
      this.stop();
      this._input.focus();
    });
    this._log.addEventListener("scroll", () => this._look(), { passive: true });
    new ResizeObserver(() => this._follow()).observe(this._log);
    this._latest.addEventListener("click", () => {
      this._follows = true;
      this._follow();
    });
    addEventListener("pagehide", () => [...this._running.keys()].forEach((chat) => this._save(chat)));
  }

  async _send() {
    const chat = this._chat;
    if (!(await this._attachments.ready())) return;
    const content = this._input.value.trim();
    if ((!content && !this._attachments.images.length) || this._running.has(chat)) return;
    this._input.value = "";
    this._fitInput();
    const images = this._attachments.take();
    chat.messages.push({ role: "user", content, ...(images.length ? { images } : {}) });
    this._answer(chat);
  }

  /** Ask again for the last reply. */
  _regenerate() {
    if (this._running.has(this._chat)) return;
    if (this._chat.messages.at(-1)?.role === "assistant") this._chat.messages.pop();
    this._answer(this._chat);
    this._log.focus(); // the button is gone
  }

  _answerCalls(results) {
    this._chat.messages.push(...results.map(({ id, content }) => ({ role: "tool", toolCallId: id, content })));
    this._answer(this._chat);
    this._log.focus();
  }

  /** Let the model reply to what a conversation holds. */
  async _answer(chat) {
    const { system, body } = this._settings();
    const messages = serverMessages(chat.messages, system);
    const message = emptyReply();
    chat.messages.push(message);
    nameChat(chat);
    this._keep(chat);
    let again; // with a key
    do {
      again = false;
      const reply = new Reply(message, () => this._progress(chat));
      this._running.set(chat, reply);
      if (chat === this._chat) this.show(chat);
      try {
        await reply.run({ ...body, messages });
      } catch (error) {
        again = error.status === 401 && (await this._askKey(error.message));
        if (!again) {
          message.error = error.message;
          this._failed(error);
        }
      }
      this._running.delete(chat);
    } while (again);
    this._keep(chat);
    if (chat === this._chat) this._update();
  }

  _progress(chat) {
    const now = performance.now();
    if (now - (this._savedAt ?? 0) > SAVE_MS) {
      this._savedAt = now;
      this._save(chat);
    }
    if (chat !== this._chat || this._frame) return;
    this._frame = requestAnimationFrame(() => {
      this._frame = 0;
      this._update();
    });
  }

  _keep(chat) {
    chat.updated = Date.now();
    this._save(chat);
    this._changed();
  }

  _save(chat) {
    if (!this._dropped.has(chat)) this._store.save(chat);
  }

  /** Draw the whole conversation. */
  _draw() {
    const actions = {
      regenerate: () => this._regenerate(),
      answerCalls: (results) => this._answerCalls(results),
    };
    this._views = [];
    const elements = [];
    for (const message of this._chat.messages) {
      if (message.role === "user") elements.push(userMessage(message));
      if (message.role === "assistant") {
        this._views.push(new ReplyView(message, actions));
        elements.push(this._views.at(-1).element);
      }
    }
    byId("messages").replaceChildren(...elements);
    byId("empty").hidden = this._chat.messages.length > 0;
    this._update(true);
  }

  /** Bring the last reply, or `all`, up to date, and follow the end if it was in view. */
  _update(all = false) {
    const { messages } = this._chat;
    const results = new Map(
      messages.filter(({ role }) => role === "tool").map((each) => [each.toolCallId, each.content]),
    );
    const running = this._running.get(this._chat) ?? null;
    for (const view of all ? this._views : this._views.slice(-1)) {
      const reply = view.message === running?.message ? running : null;
      view.update({ reply, last: view.message === messages.at(-1), results });
    }
    byId("send").hidden = running !== null;
    byId("stop").hidden = running === null;
    this._follow();
  }

  /** Go with the end, unless the reader has left it. */
  _follow() {
    if (this._follows) this._log.scrollTop = this._log.scrollHeight;
  }

  _look() {
    this._follows = this._log.scrollHeight - this._log.scrollTop - this._log.clientHeight < NEAR_PX;
    this._latest.hidden = this._follows;
  }

  _fitInput() {
    this._input.style.height = "auto";
    this._input.style.height = `${this._input.scrollHeight + 2}px`;
  }
}

// One message of a conversation, as it looks.

import { copyButton, el, setText } from "./dom.js";
import { formatCount, formatNumber, formatSeconds } from "./format.js";
import { MarkdownView } from "./markdown_view.js";

// What is to be said about a reply's end; nothing about others.
const ENDS = { length: "Cut off at the token limit.", stopped: "Stopped." };

/** Show what the reader said. */
export function userMessage({ content, images = [] }) {
  return el(
    "article",
    { class: "message user", "aria-label": "You" },
    ...(images.length ? [el("ul", { class: "images" }, ...images.map(picture))] : []),
    ...(content ? [el("div", { class: "bubble", dir: "auto" }, content)] : []),
  );
}

function picture({ name, url }) {
  if (url) return el("li", {}, el("img", { src: url, alt: name, title: name }));
  return el("li", { class: "note" }, `${name} was not kept by this browser, and is no longer sent.`);
}

/** Show a reply, also while it comes. */
export class ReplyView {
  /** `actions`: {regenerate(), answerCalls(results)}. */
  constructor(message, actions) {
    this.message = message;
    this._actions = actions;
    this._waiting = el("p", { class: "waiting" });
    this._meter = el("progress", { "aria-label": "Prompt read" });
    this._summary = el("summary", {});
    this._reasoning = el("div", { class: "reasoning", dir: "auto" });
    this._thinking = el("details", { class: "thinking" }, this._summary, this._reasoning);
    this._text = new MarkdownView();
    this._calls = el("div", { class: "calls" });
    this._callViews = [];
    this._foot = el("footer", {});
    this._drawnFoot = "";
    this.element = el(
      "article",
      { class: "message reply", "aria-label": "Reply" },
      this._waiting,
      this._thinking,
      this._text.element,
      this._calls,
      this._foot,
    );
  }

  /** Show the message as it is now. `reply`: the running one, or null; `last`: it ends the conversation. */
  update({ reply, last, results }) {
    const { message } = this;
    this.element.setAttribute("aria-busy", String(reply !== null));
    this._showWaiting(reply);
    this._thinking.hidden = !message.reasoning;
    setText(this._summary, thinkingTitle(message, reply !== null));
    this._thinking.classList.toggle("live", reply !== null && !message.content);
    setText(this._reasoning, message.reasoning ?? "");
    this._text.update(message.content);
    this._showCalls(reply, last, results);
    this._showFoot(reply, last);
  }

  _showWaiting(reply) {
    const silent =
      reply !== null && !this.message.content && !this.message.reasoning && !this.message.toolCalls?.length;
    this._waiting.hidden = !silent;
    if (!silent) return;
    const { total, processed } = reply.progress ?? {};
    const reading = total > 0 && processed < total;
    const text = reading
      ? `Reading the prompt: ${formatCount(processed)} of ${formatCount(total)} tokens`
      : "Waiting …";
    if (reading) Object.assign(this._meter, { max: total, value: processed });
    if (this._waiting.textContent !== text) this._waiting.replaceChildren(text, ...(reading ? [this._meter] : []));
  }

  _showCalls(reply, last, results) {
    const calls = this.message.toolCalls ?? [];
    calls.forEach((call, index) => {
      if (!this._callViews[index]) {
        this._callViews[index] = new CallView(call);
        this._calls.append(this._callViews[index].element);
      }
      this._callViews[index].update(call, results.get(call.id));
    });
    const open = reply === null && last && calls.length > 0;
    if (open && !this._answer) {
      const views = this._callViews;
      const button = el(
        "button",
        { type: "submit", class: "primary" },
        calls.length > 1 ? "Send results" : "Send result",
      );
      this._answer = el("form", { class: "answer" }, ...views.map((view) => view.ask()), button);
      this._answer.addEventListener("submit", (event) => {
        event.preventDefault();
        this._actions.answerCalls(views.map((view) => ({ id: view.id, content: view.answer() })));
      });
      this._calls.append(this._answer);
    } else if (!open) {
      this._answer?.remove();
      this._answer = null;
    }
  }

  _showFoot(reply, last) {
    const { message } = this;
    const state = JSON.stringify([reply !== null, last, message.error, message.finish]);
    if (state === this._drawnFoot) return;
    this._drawnFoot = state;
    const parts = [];
    if (reply === null) {
      const end = message.finish ? ENDS[message.finish] : "Broken off: the page was left.";
      if (end && !message.error) parts.push(el("p", { class: "note" }, end));
      if (message.error) parts.push(el("p", { class: "error", role: "alert" }, message.error));
      const again = el("button", { type: "button", class: "quiet", onclick: () => this._actions.regenerate() });
      again.textContent = message.error ? "Try again" : "Regenerate";
      const buttons = [message.content && copyButton(() => message.content, "Copy this reply"), last && again];
      parts.push(el("div", { class: "foot" }, ...buttons.filter(Boolean), el("small", {}, usageText(message))));
    }
    this._foot.replaceChildren(...parts);
  }
}

/** Show one call of a tool, its arguments laid out if they are whole JSON. */
class CallView {
  constructor({ id, name }) {
    this.id = id;
    this._name = name;
    this._arguments = el("pre", { tabindex: 0 });
    this._result = el("pre", { tabindex: 0 });
    this._resultPart = el(
      "div",
      { class: "result", hidden: true },
      el("span", { class: "label" }, "Result"),
      this._result,
    );
    const head = el("div", { class: "call-head" }, el("span", { class: "label" }, "Tool call"), el("code", {}, name));
    this.element = el(
      "section",
      { class: "call", "aria-label": `Call of ${name}` },
      head,
      this._arguments,
      this._resultPart,
    );
  }

  update(call, result) {
    setText(this._arguments, laidOut(call.arguments));
    this._resultPart.hidden = result === undefined;
    setText(this._result, laidOut(result ?? ""));
  }

  /** Return a field for the tool's result, which the reader gives in its place. */
  ask() {
    this._field = el("textarea", { rows: 2, required: true, spellcheck: "false" });
    return el("label", {}, `Result of ${this._name}`, this._field);
  }

  answer() {
    return this._field.value;
  }
}

function laidOut(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function thinkingTitle({ thinkingMs, content }, running) {
  if (running && !content && !thinkingMs) return "Thinking …";
  return thinkingMs ? `Thought for ${formatSeconds(Math.max(0.1, thinkingMs / 1000))}` : "Thinking";
}

function usageText({ usage, timings }) {
  if (!usage) return "";
  const rate = timings?.predicted_per_second;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const reply = `${formatCount(usage.completion_tokens)} tokens${rate ? ` at ${formatNumber(rate)} tokens/s` : ""}`;
  const prompt = `prompt ${formatCount(usage.prompt_tokens)}`;
  return `${reply} · ${prompt}${cached ? `, ${formatCount(cached)} from the cache` : ""}`;
}

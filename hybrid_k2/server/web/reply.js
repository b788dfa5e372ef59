// One reply on its way: from the frames of the stream into a message.

import { streamChat } from "./api.js";

/** Return the messages of a conversation as the server takes them, without what only the page knows. */
export function serverMessages(messages, system) {
  const sent = messages.filter(saysSomething).map((message) => {
    const { role, content, images, reasoning, toolCalls, toolCallId } = message;
    if (role === "tool") return { role, content, tool_call_id: toolCallId };
    if (role === "user") return { role, content: userContent(content, images) };
    const calls = toolCalls?.map(({ id, name, arguments: text }) => ({
      id,
      type: "function",
      function: { name, arguments: text },
    }));
    return { role, content, reasoning_content: reasoning || null, tool_calls: calls?.length ? calls : null };
  });
  return system ? [{ role: "system", content: system }, ...sent] : sent;
}

/** Return a text, or where there are images, these and then the text; images that were not kept are left out. */
function userContent(text, images = []) {
  const parts = images.filter(({ url }) => url).map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return parts.length ? [...parts, ...(text ? [{ type: "text", text }] : [])] : text;
}

const saysSomething = ({ role, content, reasoning, toolCalls }) =>
  role !== "assistant" || content || reasoning || toolCalls?.length > 0; // a reply that failed at once does not

/** Stream a reply into `message`. */
export class Reply {
  /** `changed` is called after each frame. */
  constructor(message, changed) {
    this.message = message;
    this.progress = null; // {total, processed} while the prompt is read
    this._changed = changed;
    this._stopper = new AbortController();
    this._thinkingSince = 0;
  }

  /** End the reply here; what has come stays. */
  stop() {
    this._stopper.abort();
  }

  /** Run to the end of the reply. Throws RequestError; a stop is an end like others. */
  async run(body) {
    const { message } = this;
    try {
      const options = { stream: true, return_progress: true };
      for await (const frame of streamChat({ ...body, ...options }, this._stopper.signal)) {
        this._take(frame);
        this._changed();
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      message.finish = "stopped";
    } finally {
      this._endThinking();
    }
  }

  _take(frame) {
    const { message } = this;
    if (frame.prompt_progress) this.progress = frame.prompt_progress;
    const choice = frame.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
    if (reasoning) {
      this._thinkingSince ||= performance.now();
      message.reasoning += reasoning;
    } else if (content || calls || choice.finish_reason) this._endThinking();
    if (content) message.content += content;
    for (const call of calls ?? []) this._takeCall(call);
    if (content || reasoning || calls) this.progress = null;
    if (choice.finish_reason) {
      message.finish = choice.finish_reason;
      message.usage = choice.usage ?? null;
      message.timings = frame.timings ?? null;
    }
  }

  _takeCall({ index, id, function: { name, arguments: text } }) {
    const calls = this.message.toolCalls;
    calls[index] ??= { id, name, arguments: "" };
    calls[index].arguments += text ?? "";
  }

  _endThinking() {
    if (!this._thinkingSince) return;
    this.message.thinkingMs = Math.max(1, Math.round(performance.now() - this._thinkingSince));
    this._thinkingSince = 0;
  }
}

/** Return a message that a reply may fill. */
export function emptyReply() {
  return { role: "assistant", content: "", reasoning: "", toolCalls: [], finish: null, usage: null, timings: null };
}

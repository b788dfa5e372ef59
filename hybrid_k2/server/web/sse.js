// Server-sent events from a stream of bytes.

/** Yield the data of each event. `stream`: a ReadableStream of bytes; leaving early cancels it. */
export async function* eventData(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.feed(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // nobody wants the rest
  }
}

/** Cut text into events, however it arrives. */
export class EventParser {
  constructor() {
    this._rest = "";
    this._data = [];
  }

  /** Take a piece of the stream, and return the data of the events that it completes. Comments are left out. */
  feed(text) {
    const events = [];
    const lines = (this._rest + text).split("\n");
    this._rest = lines.pop();
    for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
      if (line.startsWith("data:")) this._data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (!line && this._data.length) {
        events.push(this._data.join("\n"));
        this._data = [];
      }
    }
    return events;
  }
}

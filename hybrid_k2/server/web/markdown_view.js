// The tree of a Markdown text as elements of the page; a text that grows is drawn anew only where it may change.

import { copyButton, el } from "./dom.js";
import { parseMarkdown } from "./markdown.js";

// A line that is not complete yet can change the block that it begins, and the one before it.
const UNSETTLED = 2;

/** Show a text of Markdown in an element of its own. */
export class MarkdownView {
  constructor() {
    this.element = el("div", { class: "markdown", dir: "auto" });
    this._text = "";
    this._blocks = []; // {element, start}
  }

  /** Show this text. */
  update(text) {
    if (text === this._text) return;
    const grows = text.startsWith(this._text);
    const kept = grows ? Math.max(0, this._blocks.length - UNSETTLED) : 0;
    const from = this._blocks[kept]?.start ?? 0;
    for (const { element } of this._blocks.splice(kept)) element.remove();
    for (const { node, start } of parseMarkdown(text.slice(from))) {
      const element = render(node);
      this._blocks.push({ element, start: from + start });
      this.element.append(element);
    }
    this._text = text;
  }
}

/** Make the element of a node: the tags are the parser's, and text becomes text nodes. */
function render(node) {
  if (typeof node === "string") return node;
  const { tag, children = [] } = node;
  if (tag === "pre") return codeBlock(node);
  if (tag === "code") return el("code", {}, node.text);
  const inside = children.map(render);
  if (tag === "a") {
    return el(
      "a",
      { href: node.href, title: node.href, target: "_blank", rel: "noopener noreferrer nofollow" },
      ...inside,
    );
  }
  if (tag === "table") {
    return el(
      "div",
      { class: "scrolls", tabindex: 0, role: "group", "aria-label": "Table" },
      el("table", {}, ...inside),
    );
  }
  if (tag === "td" || tag === "th")
    return el(tag, { class: node.align, scope: tag === "th" ? "col" : null }, ...inside);
  if (tag === "ol") return el("ol", { start: node.start }, ...inside);
  return el(tag, {}, ...inside);
}

function codeBlock({ language, text }) {
  const head = el(
    "div",
    { class: "code-head" },
    el("span", {}, language || "text"),
    copyButton(() => text, "Copy this code"),
  );
  return el("div", { class: "code" }, head, el("pre", { tabindex: 0 }, el("code", {}, text)));
}

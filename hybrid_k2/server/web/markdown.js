// Blocks of Markdown (paragraphs, headings, lists, quotes, tables, code) as a tree of plain objects.
//
// HTML in the text stays text. Whatever a model writes, the cost is linear in it, and the depth of the tree bounded.

import { parseInline } from "./markdown_inline.js";

const MAX_DEPTH = 10; // of lists and quotes within each other; deeper ones are text
const MAX_COLUMNS = 64;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)/;
const ITEM = /^( {0,3})([-+*]|\d{1,9}[.)])([ \t]+|$)/;

/** Return the blocks of a text, each {node, start}: its tree, and where it begins in the text. */
export function parseMarkdown(text) {
  const lines = text.split("\n");
  const starts = [0];
  for (const line of lines) starts.push(starts.at(-1) + line.length + 1);
  return blocks(lines, 0).map(({ node, line }) => ({ node, start: starts[line] }));
}

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const { node, end } = block(lines, at, depth);
    found.push({ node, line: at });
    at = end;
  }
  return found;
}

const nodes = (lines, depth) => blocks(lines, depth).map(({ node }) => node);

/** Read the block that begins at a line: {node, end}, `end` is the first line behind it. */
function block(lines, at, depth) {
  const line = lines[at];
  const fence = openingFence(line);
  if (fence) return code(lines, at, fence);
  const level = headingLevel(line);
  if (level) return { node: { tag: `h${level}`, children: parseInline(headingText(line)) }, end: at + 1 };
  if (isRule(line)) return { node: { tag: "hr" }, end: at + 1 };
  if (depth < MAX_DEPTH) {
    if (isQuote(line)) return quote(lines, at, depth);
    if (ITEM.test(line)) return list(lines, at, depth);
  }
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at, depth);
}

function openingFence(line) {
  const found = FENCE.exec(line);
  // Backticks behind the language: code within a line.
  return found && !(found[1][0] === "`" && line.slice(found[0].length).includes("`")) ? found : null;
}

function code(lines, at, [opening, fence, language]) {
  const indent = opening.search(/[`~]/);
  const closing = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => dedent(line, indent));
  return { node: { tag: "pre", language, text: text.join("\n") }, end: end + 1 };
}

function headingLevel(line) {
  const [, marks, next] = /^ {0,3}(#+)(.?)/.exec(line) ?? [];
  return marks && marks.length <= 6 && (!next || next === " " || next === "\t") ? marks.length : 0;
}

function headingText(line) {
  const words = line
    .trim()
    .split(/[ \t]+/)
    .slice(1);
  if (/^#+$/.test(words.at(-1) ?? "")) words.pop();
  return words.join(" ");
}

function isRule(line) {
  const marks = line.replace(/[ \t]/g, "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

const isQuote = (line) => /^ {0,3}>/.test(line);

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && isQuote(lines[end])) end += 1;
  const inside = lines.slice(at, end).map((line) => line.replace(/^ {0,3}> ?/, ""));
  return { node: { tag: "blockquote", children: nodes(inside, depth + 1) }, end };
}

function list(lines, at, depth) {
  const [, , marker] = ITEM.exec(lines[at]);
  const kind = marker.at(-1); // - + * . )
  const items = [];
  let end = at;
  for (let next = at; next < lines.length;) {
    const item = ITEM.exec(lines[next]);
    if (item?.[2].at(-1) !== kind || isRule(lines[next])) break;
    end = itemEnd(lines, next, item);
    const rest = lines.slice(next + 1, end).map((line) => dedent(line, width(item)));
    items.push(nodes([lines[next].slice(item[0].length), ...rest], depth + 1));
    next = end;
    while (next < lines.length && !lines[next].trim()) next += 1;
  }
  const loose = lines.slice(at, end).some((line) => !line.trim());
  const children = items.map((item) => ({ tag: "li", children: loose ? item : item.flatMap(unwrapped) }));
  const ordered = kind === "." || kind === ")";
  return { node: { tag: ordered ? "ol" : "ul", start: ordered ? parseInt(marker, 10) : undefined, children }, end };
}

/** Find the end of an item: indented lines belong to it, and lines that go on with its paragraph. */
function itemEnd(lines, at, item) {
  const least = Math.min(width(item), 2); // models indent carelessly
  let end = at + 1;
  let blank = !lines[at].slice(item[0].length).trim();
  while (end < lines.length) {
    const line = lines[end];
    if (line.trim()) {
      const indented = line.startsWith(" ".repeat(least)) || line.startsWith("\t");
      if (!indented && (blank || beginsBlock(lines, end, 0))) break;
      blank = false;
    } else blank = true;
    end += 1;
  }
  while (end > at + 1 && !lines[end - 1].trim()) end -= 1;
  return end;
}

/** Return the width of an item's marker with its spaces; with five or more, the text is indented by itself. */
function width([, indent, marker, spaces]) {
  return indent.length + marker.length + (spaces.length > 4 ? 1 : Math.max(1, spaces.length));
}

const unwrapped = (node) => (node.tag === "p" ? [...node.children, "\n"] : [node]);

function isTable(lines, at) {
  if (!lines[at].includes("|") || !(lines[at + 1] ?? "").includes("-")) return false;
  const marks = cells(lines[at + 1]);
  return marks.length === cells(lines[at]).length && marks.every((cell) => /^:?-+:?$/.test(cell));
}

function table(lines, at) {
  const align = cells(lines[at + 1]).map((mark) =>
    mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : "left",
  );
  const row = (line, tag) => {
    const texts = cells(line);
    const children = align.map((side, index) => ({ tag, align: side, children: parseInline(texts[index] ?? "") }));
    return { tag: "tr", children };
  };
  let end = at + 2;
  const rows = [];
  while (end < lines.length && lines[end].includes("|")) {
    rows.push(row(lines[end], "td"));
    end += 1;
  }
  const head = { tag: "thead", children: [row(lines[at], "th")] };
  return { node: { tag: "table", children: [head, { tag: "tbody", children: rows }] }, end };
}

/** Cut a row at its bars; `\|` is none. */
function cells(line) {
  const found = [""];
  const row = line.trim();
  for (let at = row.startsWith("|") ? 1 : 0; at < row.length; at += 1) {
    if (row[at] === "\\" && row[at + 1] === "|") {
      found[found.length - 1] += "|";
      at += 1;
    } else if (row[at] !== "|") found[found.length - 1] += row[at];
    else if (at < row.length - 1 && found.length < MAX_COLUMNS) found.push("");
  }
  return found.map((cell) => cell.trim());
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines, end, depth)) end += 1;
  const text = lines
    .slice(at, end)
    .map((line) => line.trimStart())
    .join("\n")
    .trimEnd();
  return { node: { tag: "p", children: parseInline(text) }, end };
}

/** Say whether a line ends the paragraph before it. */
function beginsBlock(lines, at, depth) {
  const line = lines[at];
  if (openingFence(line) || headingLevel(line) || isRule(line) || isTable(lines, at)) return true;
  return depth < MAX_DEPTH && (isQuote(line) || ITEM.test(line));
}

function dedent(line, columns) {
  let cut = 0;
  while (cut < columns && line[cut] === " ") cut += 1;
  return line[cut] === "\t" && cut < columns ? line.slice(cut + 1) : line.slice(cut);
}

// Inline Markdown (emphasis, code, links) as a tree of plain objects: strings and {tag, children, ...}.
//
// The text comes from a model and may be hostile. One pass, linear in the text; the depth of the tree is bounded.

const MAX_OPEN = 24; // emphasis within emphasis
const MAX_RUN = 6; // longer runs of * and _ are ornaments, not emphasis
const MAX_URL = 2048;
const MAX_PARENTHESES = 8; // within each other in an address
const PLAIN = /[^\\`*_~[\]!<h\n]+/y; // "h" may begin a bare address
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}\p{S}]/u;
const SPACE = /\s/u;
const WORD = /[\p{L}\p{N}]/u;

/** Return the tree of one paragraph's text. */
export function parseInline(text) {
  return nested(tokens(text));
}

/** Return the address if a browser may open it from here: http and https only; null otherwise. */
export function safeUrl(text) {
  if (text.length > MAX_URL || !/^https?:\/\//i.test(text)) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

/** Cut the text into strings, finished nodes, and runs of emphasis marks {mark, count, opens, closes}. */
function tokens(text) {
  const found = [];
  const codeRuns = backtickRuns(text);
  let brackets = []; // places in `found` where a link's text may have begun
  let plain = "";
  let at = 0;

  const flush = () => {
    if (plain) found.push(plain);
    plain = "";
  };
  const add = (node) => {
    flush();
    found.push(node);
  };

  while (at < text.length) {
    const char = text[at];
    if (char === "\\") {
      const next = text[at + 1] ?? "";
      if (next === "\n") add({ tag: "br" });
      else plain += PUNCTUATION.test(next) ? next : char + next;
      at += 2;
    } else if (char === "`") {
      const length = runLength(text, at);
      const end = closingRun(codeRuns, length, at);
      if (end < 0) plain += "`".repeat(length);
      else add({ tag: "code", text: codeText(text.slice(at + length, end)) });
      at = end < 0 ? at + length : end + length;
    } else if (char === "*" || char === "_" || char === "~") {
      const count = runLength(text, at);
      const run = emphasisRun(text, at, count);
      if (run) add(run);
      else plain += char.repeat(count);
      at += count;
    } else if (char === "[" || (char === "!" && text[at + 1] === "[")) {
      const mark = char === "[" ? "[" : "![";
      flush();
      brackets.push(found.length);
      found.push(mark);
      at += mark.length;
    } else if (char === "]") {
      const target = brackets.length ? linkTarget(text, at + 1) : null;
      if (target) {
        flush();
        const [, ...inside] = found.splice(brackets.pop());
        add({ tag: "a", href: target.href, children: inside.length ? nested(inside) : [target.href] });
        brackets = []; // no links within links
        at = target.end;
      } else {
        brackets.pop();
        plain += char;
        at += 1;
      }
    } else if (char === "<") {
      const end = text.slice(at, at + MAX_URL).search(/[>\s]/);
      const href = end > 0 && text[at + end] === ">" ? safeUrl(text.slice(at + 1, at + end)) : null;
      if (href) add({ tag: "a", href, children: [text.slice(at + 1, at + end)] });
      else plain += char;
      at += href ? end + 1 : 1;
    } else if (char === "h") {
      const address = WORD.test(text[at - 1] ?? "") ? "" : bareAddress(text, at);
      const href = address && safeUrl(address);
      if (href) add({ tag: "a", href, children: [address] });
      else plain += address || char;
      at += Math.max(1, address.length);
    } else if (char === "\n") {
      if (text.slice(at - 2, at) === "  ") {
        plain = plain.trimEnd();
        add({ tag: "br" });
      } else plain += "\n";
      at += 1;
    } else {
      PLAIN.lastIndex = at;
      const run = PLAIN.exec(text)?.[0] ?? char;
      plain += run;
      at += run.length;
    }
  }
  flush();
  return found;
}

/** Nest what stands between marks of emphasis that belong together; others become text. */
function nested(found) {
  const root = { children: [] };
  const open = [root];
  const count = { "*": 0, _: 0, "~": 0 }; // of open marks, so that none is looked for in vain

  const dissolve = () => {
    const { mark, left, children } = open.pop();
    count[mark] -= 1;
    open.at(-1).children.push(mark.repeat(left), ...children);
  };

  for (const token of found) {
    if (token.mark === undefined) {
      open.at(-1).children.push(token);
      continue;
    }
    const { mark } = token;
    let left = token.count;
    while (left && token.closes && count[mark]) {
      while (open.at(-1).mark !== mark) dissolve();
      const frame = open.at(-1);
      if (isOfThree(frame, token)) break;
      const used = mark === "~" ? 2 : Math.min(2, left, frame.left);
      const node = { tag: mark === "~" ? "del" : used === 2 ? "strong" : "em", children: frame.children };
      frame.left -= used;
      left -= used;
      frame.children = [node];
      if (!frame.left) {
        open.pop();
        count[mark] -= 1;
        open.at(-1).children.push(node);
      }
    }
    if (left && token.opens && open.length < MAX_OPEN) {
      open.push({ mark, left, children: [], token });
      count[mark] += 1;
    } else if (left) open.at(-1).children.push(mark.repeat(left));
  }
  while (open.length > 1) dissolve();
  return root.children;
}

/** Say whether `*` within `**` does not end it, or the other way around: CommonMark's rule of three. */
function isOfThree({ token: opening }, closing) {
  const both = opening.closes || closing.opens;
  return both && (opening.count + closing.count) % 3 === 0 && closing.count % 3 !== 0;
}

/** Describe a run of * _ or ~ that may open or close emphasis; null for one that is text. */
function emphasisRun(text, at, count) {
  const mark = text[at];
  if (count > MAX_RUN || (mark === "~" && count !== 2)) return null;
  const before = text[at - 1] ?? " ";
  const after = text[at + count] ?? " ";
  const opens = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
  const closes = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
  const inWord = mark === "_" && WORD.test(before) && WORD.test(after); // snake_case
  return (opens || closes) && !inWord ? { mark, count, opens, closes } : null;
}

/** Read `(address "title")` at `at`; the title is left out. */
function linkTarget(text, at) {
  if (text[at] !== "(") return null;
  let depth = 0;
  for (let end = at; end < Math.min(text.length, at + MAX_URL); end += 1) {
    if (text[end] === "\n" || depth > MAX_PARENTHESES) return null;
    if (text[end] === "(") depth += 1;
    if (text[end] === ")") depth -= 1;
    if (depth) continue;
    const [address] = text
      .slice(at + 1, end)
      .trim()
      .split(/\s/, 1);
    const href = safeUrl(address.startsWith("<") && address.endsWith(">") ? address.slice(1, -1) : address);
    return href && { href, end: end + 1 };
  }
  return null;
}

/** Return the address that begins at `at`, without punctuation that ends the sentence around it; "" for none. */
function bareAddress(text, at) {
  const address = /^https?:\/\/[^\s<>"`*]+/i.exec(text.slice(at, at + MAX_URL))?.[0] ?? "";
  let end = address.length;
  let unopened = [...address].reduce((sum, char) => sum + (char === ")") - (char === "("), 0);
  while (end && (/[.,;:!?'_~\]]/.test(address[end - 1]) || (address[end - 1] === ")" && unopened > 0))) {
    if (address[end - 1] === ")") unopened -= 1;
    end -= 1;
  }
  return address.slice(0, end);
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** Return the places of all runs of backticks by their length, each list in order. */
function backtickRuns(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, { places: [], next: 0 });
    runs.get(run.length).places.push(index);
  }
  return runs;
}

/** Return the place of the next run of this length behind `at`, or -1. `at` only grows from call to call. */
function closingRun(runs, length, at) {
  const run = runs.get(length);
  if (!run) return -1;
  while (run.places[run.next] <= at) run.next += 1;
  return run.places[run.next] ?? -1;
}

function codeText(text) {
  const line = text.replaceAll("\n", " ");
  const padded = line.length > 2 && line.startsWith(" ") && line.endsWith(" ") && line.trim();
  return padded ? line.slice(1, -1) : line;
}

"""The page's modules that need no browser, run by node: Markdown, events of a stream, conversations kept."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hybrid_k2.server.web_page import FOLDER

Node = Callable[..., Any]
PNG_URI = "data:image/png;base64,iVBORw0KGgo="
BLOCKS = {*(f"h{level}" for level in range(1, 7)), "p", "ul", "ol", "li", "blockquote", "hr", "pre"}
TAGS = BLOCKS | {"table", "thead", "tbody", "tr", "th", "td", "em", "strong", "del", "code", "a", "br"}
FRAGMENTS = [
    *("*", "**", "***", "_", "__", "~~", "`", "``", "```", "~~~", "[", "]", "![", "](", "(", ")", "<", ">", "|", "\\"),
    *(
        "\n",
        "\n\n",
        "  \n",
        " ",
        "\t",
        "    ",
        "- ",
        "1. ",
        "2) ",
        "+ ",
        "> ",
        "# ",
        "###### ",
        "---",
        "|-|-|",
        "| a | b |",
    ),
    *("a", "word", "snake_case", "ü", "語", "👍", "\u202e", "\0", "&lt;", "javascript:alert(1)", "data:text/html,x"),
    *("http://x.y", "https://x.y/z?a=b#c", "<http://x.y>", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>"),
    *("[a](javascript:alert(1))", "[a](http://x.y)", "[a](//x.y)", "[a](/x)", "![a](https://x.y/i.png)"),
]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """Run code that imports the page's modules, and return what it prints as JSON; `value` is what it gets."""
    program = shutil.which("node")
    if program is None or int(subprocess.check_output([program, "--version"], text=True)[1:].split(".")[0]) < 20:
        pytest.skip("needs node 20 or newer")
    folder = tmp_path_factory.mktemp("modules")
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    (folder / "package.json").write_text('{"type": "module"}')

    def run(code: str, value: Any = None) -> Any:
        read = 'import { readFileSync } from "node:fs";\nconst value = JSON.parse(readFileSync(0, "utf8"));\n'
        (folder / "test_code.js").write_text(read + code)
        done = subprocess.run(
            [program, "test_code.js"],
            cwd=folder,
            input=json.dumps(value),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


PARSE = """
import { parseMarkdown } from "./markdown.js";
console.log(JSON.stringify(value.map((text) => parseMarkdown(text).map(({ node }) => node))));
"""


def parse(node: Node, *texts: str) -> list[Any]:
    return list(node(PARSE, texts))


def html(tree: Any) -> str:
    """Write a tree in short: for comparison, not for browsers."""
    if isinstance(tree, str):
        return tree
    if isinstance(tree, list):
        return "".join(map(html, tree))
    names = "".join(f" {name}={tree[name]}" for name in ("href", "start", "align", "language") if tree.get(name))
    return f"<{tree['tag']}{names}>{tree.get('text', '')}{html(tree.get('children', []))}</{tree['tag']}>".replace(
        "\n</li>", "</li>"
    )


def walk(tree: Any, depth: int = 0) -> Iterator[tuple[Any, int]]:
    yield tree, depth
    for child in tree.get("children", []) if isinstance(tree, dict) else []:
        yield from walk(child, depth + 1)


EXAMPLES = {
    "plain": "<p>plain</p>",
    "**b** *i* ***both*** ~~d~~": "<p><strong>b</strong> <em>i</em> <em><strong>both</strong></em> <del>d</del></p>",
    "**a*b*c** snake_case_name": "<p><strong>a<em>b</em>c</strong> snake_case_name</p>",
    "* a * b": "<ul><li>a * b</li></ul>",
    "`` a`b `` and `*x*`": "<p><code>a`b</code> and <code>*x*</code></p>",
    r"\*no\* \<b> a\b": r"<p>*no* <b> a\b</p>",
    "one  \ntwo\\\nthree\nfour": "<p>one<br></br>two<br></br>three\nfour</p>",
    "# A *b* #\ntext": "<h1>A <em>b</em></h1><p>text</p>",
    "#no\n####### no": "<p>#no\n####### no</p>",
    "a\n\n---\n* * *": "<p>a</p><hr></hr><hr></hr>",
    "- a\n- b\n  - c\n\n    more\n- d": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>more</p></li></ul></li>"
    "<li><p>d</p></li></ul>",
    "3. a\n4. b\n\ntext": "<ol start=3><li>a</li><li>b</li></ol><p>text</p>",
    "- a\nlazy\n\n1) x": "<ul><li>a\nlazy</li></ul><ol start=1><li>x</li></ol>",
    "1. a\n   ```py\n   x = 1\n   ```\n2. b": "<ol start=1><li>a\n<pre language=py>x = 1</pre></li><li>b</li></ol>",
    "> a\n> - b\n\nc": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>",
    "```js\nlet a = '<b>';\n\n  *x*\n```\nafter": "<pre language=js>let a = '<b>';\n\n  *x*</pre><p>after</p>",
    "~~~~\n```\n~~~\n~~~~": "<pre>```\n~~~</pre>",
    "```\nopen": "<pre>open</pre>",
    "| a | b |\n|:-:|--:|\n| `x` | 1 \\| 2 |\n| y |\nend": "<table><thead><tr><th align=center>a</th><th align=right>b"
    "</th></tr></thead><tbody><tr><td align=center><code>x</code></td><td align=right>1 | 2</td></tr><tr>"
    "<td align=center>y</td><td align=right></td></tr></tbody></table><p>end</p>",
    "a | b\nno table": "<p>a | b\nno table</p>",
    "[a *b*](https://x.y/z_(q) 'title')": "<p><a href=https://x.y/z_(q)>a <em>b</em></a></p>",
    "![alt](https://x.y/i.png)": "<p><a href=https://x.y/i.png>alt</a></p>",
    "<https://x.y/> and (https://x.y/a).": "<p><a href=https://x.y/>https://x.y/</a> and "
    "(<a href=https://x.y/a>https://x.y/a</a>).</p>",
    "[a](javascript:alert(1)) [b](/x) [c](//x.y)": "<p>[a](javascript:alert(1)) [b](/x) [c](//x.y)</p>",
    "[a](http://x.y\n) [a] [b][c]": "<p>[a](<a href=http://x.y/>http://x.y</a>\n) [a] [b][c]</p>",
    "<b>x</b> &lt;": "<p><b>x</b> &lt;</p>",
}


def test_markdown(node: Node) -> None:
    trees = parse(node, *EXAMPLES)
    for (text, expected), tree in zip(EXAMPLES.items(), trees, strict=True):
        assert html(tree) == expected, text


def test_hostile_markdown_has_known_tags_and_addresses_only(node: Node) -> None:
    seed = random.randrange(2**32)
    choice = random.Random(seed)
    texts = ["".join(choice.choices(FRAGMENTS, k=choice.randrange(60))) for _ in range(3000)]
    for text, tree in zip(texts, parse(node, *texts), strict=True):
        for part, depth in (found for block in tree for found in walk(block)):
            assert depth < 100, (seed, text)
            if isinstance(part, dict):
                assert part["tag"] in TAGS, (seed, text)
                assert part.keys() <= {"tag", "children", "text", "href", "start", "align", "language"}
                if "href" in part:
                    assert re.match(r"https?://", part["href"]), (seed, text)


def test_words_are_neither_lost_nor_repeated(node: Node) -> None:
    seed = random.randrange(2**32)
    choice = random.Random(seed)
    marks = ["*", "**", "_", "~~", "[", "]", "<", "\n", "\n\n", "- ", "> ", "# ", " ", "1. ", "!", "(", ")", "|"]
    for _ in range(3):
        texts = []
        for _ in range(300):
            parts = [part for word in range(choice.randrange(12)) for part in (choice.choice(marks), f"w{word}w")]
            texts.append("".join(parts))
        for text, tree in zip(texts, parse(node, *texts), strict=True):
            assert re.findall(r"w\d+w", html(tree)) == re.findall(r"w\d+w", text), (seed, text)


def test_markdown_takes_time_in_proportion_to_the_text(node: Node) -> None:
    """What makes careless parsers quadratic, or the page's tree too deep for a browser."""
    n = 20_000
    texts = [
        *(
            mark * n
            for mark in ("*", "*a ", "a* ", "_a", "[", "![", "[a](", "`", "<http://", "\\", "> ", "- ", "# ", "|")
        ),
        *(mark * n for mark in ("http://x ", "h", "(", "a | b\n", "> a\n", "- a\n", "~~a", "[a](http://x) ", "  \n")),
        "*a" * n + "b*" * n,
        "*a" * n + "b_" * n,
        "#" + " " * n + "x",
        "|" * n + "\n" + "|-" * n,
        "http://" + "(" * n + ")" * n,
        "\n".join(" " * indent + "- a" for indent in range(500)),
        "\n".join(">" * depth + "a" for depth in range(500)),
        "a".join("`" * length for length in range(300)),
    ]
    code = """
    import { parseMarkdown } from "./markdown.js";
    const depth = (node) => (node.children ?? []).reduce((most, child) => Math.max(most, 1 + depth(child)), 0);
    const results = value.map((text) => {
      const before = process.cpuUsage().user;
      const blocks = parseMarkdown(text);
      return [(process.cpuUsage().user - before) / 1e6, Math.max(0, ...blocks.map(({ node }) => depth(node)))];
    });
    console.log(JSON.stringify(results));
    """
    for text, (seconds, depth) in zip(texts, node(code, texts), strict=True):
        assert seconds < 2, f"{text[:20]!r}: 0.2 s of a processor are enough"
        assert depth < 100, text[:20]


def test_blocks_say_where_they_begin(node: Node) -> None:
    """A text that grows is parsed again from such a place: the rest must come out the same."""
    code = """
    import { parseMarkdown } from "./markdown.js";
    const wrong = [];
    for (const text of value) {
      const whole = parseMarkdown(text);
      for (const [index, { start }] of whole.entries()) {
        const rest = parseMarkdown(text.slice(start)).map(({ node }) => node);
        if (JSON.stringify(rest) !== JSON.stringify(whole.slice(index).map(({ node }) => node))) wrong.push(text);
      }
    }
    console.log(JSON.stringify(wrong));
    """
    choice = random.Random(random.randrange(2**32))
    texts = ["".join(choice.choices(FRAGMENTS, k=40)) for _ in range(500)]
    assert node(code, [*EXAMPLES, *texts]) == []


def test_events_are_the_same_however_they_arrive(node: Node) -> None:
    code = """
    import { eventData } from "./sse.js";
    const results = [];
    for (const size of [1, 2, 3, 7, 1000]) {
      const bytes = new TextEncoder().encode(value);
      const stream = new ReadableStream({
        start(controller) {
          for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
          controller.close();
        },
      });
      const events = [];
      for await (const data of eventData(stream)) events.push(data);
      results.push(events);
    }
    console.log(JSON.stringify(results));
    """
    stream = (
        'data: {"a": "ü👍"}\n\n: keep-alive\n\ndata: one\r\ndata: two\r\n\r\n'
        "event: x\ndata:three\n\n\ndata: [DONE]\n\ndata: half"
    )
    expected = ['{"a": "ü👍"}', "one\ntwo", "three", "[DONE]"]
    assert node(code, stream) == [expected] * 5


STORAGE = """
import { ChatStore, nameChat } from "./store.js";
class Storage {
  constructor(room) { this.room = room; this.items = new Map(); }
  get length() { return this.items.size; }
  key(index) { return [...this.items.keys()][index]; }
  getItem(key) { return this.items.get(key) ?? null; }
  removeItem(key) { this.items.delete(key); }
  setItem(key, text) {
    const used = [...this.items].reduce((sum, [name, each]) => sum + (name === key ? 0 : each.length), 0);
    if (used + text.length > this.room) throw new DOMException("full", "QuotaExceededError");
    this.items.set(key, text);
  }
}
const say = (store, text, updated) => {
  const chat = { ...store.create(), updated, messages: [{ role: "user", content: text }] };
  nameChat(chat);
  store.save(chat);
  return chat;
};
"""


def test_conversations_are_kept_and_bounded(node: Node) -> None:
    code = """
    const storage = new Storage(1e9);
    const store = new ChatStore(storage);
    for (let number = 0; number < 130; number += 1) say(store, `question ${number}\\nmore`, number);
    const again = new ChatStore(storage);
    console.log(JSON.stringify({ count: storage.length, titles: again.latest().map(({ title }) => title) }));
    """
    kept = node(STORAGE + code)
    assert kept["count"] == 100
    assert kept["titles"] == [f"question {number}" for number in range(129, 29, -1)]


def test_a_full_storage_loses_the_oldest_and_never_the_page(node: Node) -> None:
    code = """
    const storage = new Storage(2000);
    const store = new ChatStore(storage);
    for (let number = 0; number < 20; number += 1) say(store, `${number} `.padEnd(300, "x"), number);
    const kept = store.latest().map(({ messages }) => parseInt(messages[0].content));
    const complaintBefore = store.complaint;
    const large = say(store, "y".repeat(5000), 99);
    const none = new ChatStore(null);
    const there = say(none, "z", 1);
    console.log(JSON.stringify({
      kept, complaintBefore, complaint: store.complaint, inMemory: store.chats.has(large.id),
      none: [none.chats.has(there.id), none.complaint !== "", none.settings()],
    }));
    """
    result = node(STORAGE + code)
    assert result["kept"] == list(range(19, 19 - len(result["kept"]), -1))
    assert 3 <= len(result["kept"]) <= 5
    assert result["complaintBefore"] == ""
    assert "no room" in result["complaint"]
    assert result["inMemory"]
    assert result["none"] == [True, True, {}]


def test_what_others_wrote_into_the_storage_does_no_harm(node: Node) -> None:
    code = """
    const storage = new Storage(1e9);
    for (const [key, text] of Object.entries(value)) storage.setItem(key, text);
    const store = new ChatStore(storage);
    console.log(JSON.stringify([store.latest().map(({ id }) => id), store.settings()]));
    """
    good = {"id": "g", "title": "t", "updated": 1, "messages": [{"role": "user", "content": "x"}]}
    chats = {
        "g": good,
        "wrong-id": good,
        "a": {**good, "id": "a", "messages": "none"},
        "b": {**good, "id": "b", "messages": [{"role": "system", "content": "x"}]},
        "c": {**good, "id": "c", "messages": [{"role": "assistant", "content": "x", "toolCalls": [{"id": 1}]}]},
        "d": {**good, "id": "d", "messages": [None]},
        "e": {**good, "id": "e", "updated": "now"},
        "f": [1],
        **{
            f"i{number}": {**good, "id": f"i{number}", "messages": [{"role": "user", "content": "x", "images": images}]}
            for number, images in enumerate(
                (
                    "none",
                    [None],
                    [{"name": 1, "url": None}],
                    [{"name": "x"}],
                    [{"name": "x", "url": "http://x.y/z.png"}],
                    [{"name": "x", "url": "data:image/svg+xml;base64,AA=="}],
                    [{"name": "x", "url": f" {PNG_URI}"}],
                )
            )
        },
    }
    items = {f"hybrid-k2.chat.{name}": json.dumps(chat) for name, chat in chats.items()}
    items |= {"hybrid-k2.chat.h": "{", "other": "x", "hybrid-k2.settings": "[]"}
    assert node(STORAGE + code, items) == [["g"], {}]


def test_what_is_sent_of_a_conversation(node: Node) -> None:
    code = """
    import { serverMessages } from "./reply.js";
    console.log(JSON.stringify(serverMessages(value, "be brief")));
    """
    call = {"id": "functions.f:0", "name": "f", "arguments": "{}"}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "reasoning": "", "toolCalls": [], "error": "failed at once"},
        {"role": "user", "content": "b"},
        {
            "role": "assistant",
            "content": "c",
            "reasoning": "r",
            "toolCalls": [call],
            "finish": "tool_calls",
            "usage": {},
        },
        {"role": "tool", "toolCallId": "functions.f:0", "content": "1"},
        {"role": "user", "content": "d", "images": [{"name": "x", "url": PNG_URI}, {"name": "lost", "url": None}]},
        {"role": "user", "content": "", "images": [{"name": "x", "url": PNG_URI}]},
        {"role": "user", "content": "e", "images": [{"name": "lost", "url": None}]},
    ]
    image = {"type": "image_url", "image_url": {"url": PNG_URI}}
    sent = [{name: value for name, value in message.items() if value is not None} for message in node(code, messages)]
    assert sent == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {
            "role": "assistant",
            "content": "c",
            "reasoning_content": "r",
            "tool_calls": [{"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "functions.f:0"},
        {"role": "user", "content": [image, {"type": "text", "text": "d"}]},
        {"role": "user", "content": [image]},
        {"role": "user", "content": "e"},
    ]


def test_images_give_way_before_conversations_do(node: Node) -> None:
    code = """
    const storage = new Storage(3000);
    const store = new ChatStore(storage);
    const other = say(store, "other".padEnd(300, "x"), 1);
    const chat = { ...store.create(), updated: 2, messages: [{ role: "user", content: "look", images: value }] };
    store.save(chat);
    const kept = new ChatStore(storage);
    const large = { ...chat, messages: [{ ...chat.messages[0], content: "y".repeat(2500) }] };
    store.save(large);
    console.log(JSON.stringify({
      small: kept.chats.get(chat.id).messages[0].images, first: store.chats.get(chat.id).messages[0].images.length,
      complaint: store.complaint, others: storage.getItem("hybrid-k2.chat." + other.id),
    }));
    """
    images = [{"name": "a.png", "url": PNG_URI}]
    result = node(STORAGE + code, images)
    assert result["small"] == images
    assert "keep the images" in result["complaint"]
    assert result["others"] is None  # the text alone needed its room
    lost = [{"name": "b.png", "url": PNG_URI + "A" * 3000}, *images]
    result = node(STORAGE + code.replace("2500", "25"), lost)
    assert result["small"] == [{"name": "b.png", "url": None}, {"name": "a.png", "url": None}]
    assert result["first"] == 2
    assert "keep the images" in result["complaint"]
    assert result["others"] is not None


def test_images_are_told_by_their_first_bytes(node: Node) -> None:
    code = """
    import { imageType } from "./images.js";
    console.log(JSON.stringify(value.map((bytes) => imageType(new Uint8Array(bytes)))));
    """
    beginnings = {
        b"\x89PNG\r\n\x1a\n\0\0\0\r": "image/png",
        b"\xff\xd8\xff\xe0": "image/jpeg",
        b"RIFF\n\r\0\xffWEBP": "image/webp",
        b"GIF87a": "image/gif",
        b"GIF89a123456": "image/gif",
        b"": None,
        b"RIFF\0\0\0\0WAVE": None,
        b"\n\xff\xd8\xff": None,
        b"<svg/>": None,
    }
    assert node(code, [[*beginning] for beginning in beginnings]) == [*beginnings.values()]


def test_whether_an_image_is_to_be_turned(node: Node) -> None:
    code = """
    import { isTurned } from "./images.js";
    console.log(JSON.stringify(value.map((bytes) => isTurned(new Uint8Array(bytes)))));
    """

    def exif(order: str, orientation: int) -> bytes:
        mark, of = (b"II", "<") if order == "little" else (b"MM", ">")
        entries = [(0x0110, 2, 1, 7), (0x0112, 3, 1, orientation if order == "little" else orientation << 16)]
        listed = b"".join(struct.pack(f"{of}HHII", *entry) for entry in entries)
        return b"\xff\xd8\xff\xe1\0\x2eExif\0\0" + mark + struct.pack(f"{of}HIH", 42, 8, len(entries)) + listed

    whole = {exif(order, number): number > 1 for order in ("little", "big") for number in (1, 3, 6, 8)}
    assert node(code, [[*data] for data in whole]) == [*whole.values()]
    seed = random.randrange(2**32)
    choice = random.Random(seed)
    bent = [exif("big", 6)[:length] for length in range(len(exif("big", 6)) - 4)]  # the value is not there
    bent += [b"Exif\0\0" + choice.randbytes(choice.randrange(40)) for _ in range(200)]
    assert all(isinstance(each, bool) for each in node(code, [[*data] for data in bent])), seed
    assert not any(node(code, [[*data] for data in bent[: len(bent) - 200]])), seed

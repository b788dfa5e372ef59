"""Feed replies to the output parser, whole and cut, and sum up its events."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

from hybrid_k2.protocol import Event, OutputParser, Tokenizer
from tests.protocol_strategies import joined, small_tokenizer, tokenizers

SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGS, END_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
ONE_SECTION, END_ONE_SECTION = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
MARKERS = [SECTION, END_SECTION, CALL, ARGS, END_CALL, "<think>", "</think>"]
NO_TEXT = ["<|im_end|>", "[EOS]", "[EOT]", "[PAD]", "[BOS]", "[UNK]"]
SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))


def tool(name: str, *properties: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {key: {"type": "string"} for key in properties},
        "required": list(required),
    }
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    tool("get_weather", "city", "days", required=("city",)),
    tool("exec", "command", required=("command",)),
    tool("a.b-c", "x"),
    tool("step2", "n", required=("n",)),
]


class Reply:
    """What the events of one reply amount to."""

    def __init__(self, events: list[Event], parser: OutputParser) -> None:
        assert all(event.text for event in events if event.kind not in ("tool_call_begin", "tool_call_end"))
        self.events = joined(events)
        self.parser = parser
        self.reasoning = "".join(event.text for event in events if event.kind == "reasoning")
        self.content = "".join(event.text for event in events if event.kind == "content")
        self.begun = [(event.index, event.id, event.name) for event in events if event.kind == "tool_call_begin"]
        ended = {event.index for event in events if event.kind == "tool_call_end"}
        self.calls = [(name, self.arguments(index)) for index, _, name in self.begun if index in ended]

    def arguments(self, index: int | None) -> str:
        parts = (e.text for e in self.events if e.kind == "tool_call_arguments" and e.index == index)
        return "".join(parts)


def parse_ids(ids: list[int], tokenizer: Tokenizer, sizes: list[int] | None = None, **options: Any) -> Reply:
    parser = OutputParser(tokenizer, **options)
    events: list[Event] = []
    for chunk in cut(ids, sizes or [len(ids)]):
        events += parser.feed(chunk)
    return Reply(events + parser.finish(), parser)


def parse_text(text: str, sizes: list[int] | None = None, **options: Any) -> Reply:
    parser = OutputParser(small_tokenizer(), **options)
    events: list[Event] = []
    for chunk in cut(text, sizes or [len(text)]):
        events += parser.feed_text(chunk)
    return Reply(events + parser.finish(), parser)


def cut(whole: Any, sizes: list[int]) -> list[Any]:
    """Cut into chunks of the given sizes, over and over; a size of 0 feeds nothing."""
    chunks, start, turn = [], 0, 0
    while start < len(whole):
        size = sizes[turn % len(sizes)] or (0 if turn % 2 else 1)
        chunks.append(whole[start : start + size])
        start, turn = start + size, turn + 1
    return chunks


def every_way(text: str, **options: Any) -> list[Reply]:
    """Parse a reply, written with marker names, as ids and as text, at once and in small pieces."""
    replies = []
    for tokenizer in tokenizers():
        ids = tokenizer.encode(text, allow_special=True)
        replies += [parse_ids(ids, tokenizer, sizes, **options) for sizes in ([len(ids)], [1], [2, 3])]
    return replies + [parse_text(text, sizes, **options) for sizes in ([len(text)], [1], [2, 5])]


def check(text: str, *, reasoning: str = "", content: str = "", calls: Any = (), **options: Any) -> Reply:
    options = {"tools": TOOLS, **options}
    replies = every_way(text, **options)
    for reply in replies:
        assert (reply.reasoning, reply.content, reply.calls) == (reasoning, content, list(calls))
        assert reply.events == replies[0].events
    return replies[0]


def call(name: str, arguments: str) -> str:
    return f"{CALL}{name}{ARGS}{arguments}{END_CALL}"

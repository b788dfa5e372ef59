"""Render conversations with the engine's own prompt writer, and mark the parts that the model learns to write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from hybrid_k2.protocol.prompt import Segment, render_segments
from hybrid_k2.protocol.tokens import IM_ASSISTANT, IM_END, THINK_BEGIN, THINK_END

Json = dict[str, Any]


class Part(NamedTuple):
    """Hold a piece of the rendered chat: a control token or plain text, and whether it is trained."""

    text: str
    control: bool
    trained: bool


def render_prompt(messages: list[Json], tools: list[Json] | None, thinking: bool) -> list[Part]:
    """Render messages up to the point where the model writes."""
    segments = render_segments([clean(m) for m in messages], tools, thinking)
    return [Part(s.text, s.control, False) for s in segments]


def render(messages: list[Json], tools: list[Json] | None, thinking: bool) -> list[Part]:
    """Render a conversation that ends with an answer, as the model would have come to write it."""
    *before, last = messages
    segments = render_segments([clean(m) for m in before], tools, thinking)
    if thinking:
        segments += [Segment(last["reasoning_content"], False), Segment(THINK_END, True)]
    segments += [Segment(last["content"], False), Segment(IM_END, True)]
    wanted = [m.get("trained", True) for m in before if m["role"] == "assistant"] + [True]
    return list(mark(segments, wanted))


def clean(message: Json) -> Json:
    """Drop our own mark from a message."""
    return {key: value for key, value in message.items() if key != "trained"}


def mark(segments: list[Segment], wanted: list[bool]) -> Iterator[Part]:
    """Mark what wanted assistant messages say: a thought with its end, the answer, the calls, the end."""
    replies = iter(wanted)
    trained = inside = False
    previous = ""
    for s in segments:
        opens = s.control and s.text == THINK_BEGIN
        # The end of an empty thought comes from the prompt; the model never writes it.
        given = s.control and s.text == THINK_END and previous == THINK_BEGIN
        yield Part(s.text, s.control, trained and inside and not opens and not given)
        if s.control and s.text == IM_ASSISTANT:
            trained = next(replies)
        inside = (inside or opens) and not (s.control and s.text == IM_END)
        previous = s.text if s.control else ""


def call(name: str, index: int, arguments: Json) -> Json:
    """Make a tool call with K2.6's id."""
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": f"functions.{name}:{index}", "type": "function", "function": {"name": name, "arguments": text}}

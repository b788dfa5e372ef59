"""A reply put together from the frames of a stream."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid_k2.cli.remote.reply import ReplyParts
from hybrid_k2.engine.reply import ToolCall
from hybrid_k2.protocol import Event


def frame(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def call(arguments: str, name: str | None = None, call_id: str | None = None) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return frame(tool_calls=[{"index": 0, "function": function} | ({"id": call_id} if call_id else {})])


def take(*frames: dict[str, Any]) -> tuple[ReplyParts, list[Event]]:
    parts = ReplyParts()
    return parts, [event for one in frames for event in parts.take(one)]


def test_events_and_the_reply() -> None:
    usage = {
        "prompt_tokens": 9,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    times = {"prompt_ms": 500, "predicted_ms": 250.0, "prompt_per_second": 10, "predicted_per_second": None}
    end = frame("tool_calls")
    end["choices"][0]["usage"] = usage
    parts, events = take(
        frame(role="assistant", content=""),
        frame(reasoning_content="I ", reasoning="I "),
        frame(reasoning_content="think.", reasoning="think."),
        frame(reasoning_content="", reasoning=""),
        frame(content="Well."),
        call("", "add", "functions.add:0"),
        call('{"a": '),
        call("1}"),
        call("", "now", "functions.now:1"),
        call("{}"),
        {**end, "timings": times},
        {"choices": [], "usage": usage},
    )
    add = {"index": 0, "id": "functions.add:0", "name": "add"}
    now = {"index": 1, "id": "functions.now:1", "name": "now"}
    assert events == [
        Event("reasoning", "I "),
        Event("reasoning", "think."),
        Event("content", "Well."),
        Event("tool_call_begin", **add),
        Event("tool_call_arguments", '{"a": ', **add),
        Event("tool_call_arguments", "1}", **add),
        Event("tool_call_end", **add),
        Event("tool_call_begin", **now),
        Event("tool_call_arguments", "{}", **now),
        Event("tool_call_end", **now),
    ]
    reply = parts.reply(seed=7)
    assert (reply.reasoning, reply.content, reply.finish_reason, reply.seed) == ("I think.", "Well.", "tool_calls", 7)
    assert reply.tool_calls == (
        ToolCall("functions.add:0", "add", '{"a": 1}'),
        ToolCall("functions.now:1", "now", "{}"),
    )
    assert (reply.usage.prompt_tokens, reply.usage.cached_tokens) == (9, 4)
    assert (reply.usage.completion_tokens, reply.usage.reasoning_tokens) == (5, 2)
    assert (reply.timings.prefill_s, reply.timings.decode_s) == (0.5, 0.25)
    assert (reply.timings.prefill_tokens_per_s, reply.timings.decode_tokens_per_s) == (10, None)


@pytest.mark.parametrize(
    ("arguments", "reason", "complete"),
    [
        ('{"a": 1}', "length", True),
        ('{"a": 1', "length", False),
        ("", "length", False),
        ('{"a": 1', "stop", False),
        ('{"a": 1', "tool_calls", True),  # the model wrote it so, and ended it
        ('{"a": 1}', None, False),  # cancelled: nobody knows
    ],
)
def test_a_call_that_may_be_cut_short(arguments: str, reason: str | None, complete: bool) -> None:
    parts, events = take(call(arguments, "add", "x"), *([frame(reason)] if reason else []))
    reply = parts.reply(seed=None)
    assert bool(reply.tool_calls) is complete
    assert (events[-1].kind == "tool_call_end") is complete
    assert reply.finish_reason == (reason or "cancelled")
    assert ("tool_calls" in reply.message()) is complete

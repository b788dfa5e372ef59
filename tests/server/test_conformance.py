"""Whatever a model writes, cut anyhow, arrives through HTTP as the parser reads it offline, in each dialect."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_k2.cli.remote.reply import ReplyParts
from hybrid_k2.protocol import OutputParser, Tokenizer, canonical_history
from tests.output_replies import MARKERS, NO_TEXT, SLOW, TOOLS, Reply, call, cut
from tests.server.conftest import Client
from tests.server.scripted import Script, ScriptedService
from tests.server.test_anthropic import events as message_events
from tests.server.test_chat import check_contract, joined
from tests.server.test_responses import events as response_events

USER = [{"role": "user", "content": "hello"}]
PIECES = st.sampled_from(
    [
        *MARKERS,
        *NO_TEXT,
        call("functions.get_weather:0", '{"city": "Zürich 🙂", "n": 9007199254740993}'),
        call("call_2", '{"command": "echo \\"<|tool_call_end|>\\""}'),
        call("functions.exec:1", '{"command": "cut'),
        "functions.step2:3",
        '{"x": 1}',
        "prose 你好 ",
        "`<|tool_call_end|>`",
        " \n",
    ]
)
REPLIES = st.lists(PIECES, min_size=1, max_size=9).map("".join)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def offline(tokenizer: Tokenizer, ids: list[int]) -> Reply:
    _, call_ids = canonical_history(USER)
    parser = OutputParser(tokenizer, TOOLS, True, call_ids)
    return Reply(parser.feed(ids) + parser.finish(), parser)


def all_calls(reply: Reply) -> list[tuple[Any, ...]]:
    """The calls that began, with what came of their arguments."""
    return [(call_id, name, reply.arguments(index)) for index, call_id, name in reply.begun]


@settings(SLOW, max_examples=60)
@given(data=st.data())
def check(client: Client, service: ScriptedService, data: st.DataObject) -> None:
    ids = service.tokenizer.encode(data.draw(REPLIES), allow_special=True)
    expected = offline(service.tokenizer, ids)
    service.scripts = [Script(list(cut(ids, data.draw(SIZES)))) for _ in range(4)]
    tools = [tool["function"] for tool in TOOLS]

    asked: dict[str, Any] = {"messages": USER, "tools": TOOLS}
    frames = client.frames("/v1/chat/completions", asked)
    check_contract(frames)
    assert joined(frames, "reasoning_content") == expected.reasoning
    assert joined(frames, "content") == expected.content
    calls: list[list[str]] = []
    for frame in frames:
        for part in frame["choices"][0]["delta"].get("tool_calls", []):
            if "id" in part:
                calls.append([part["id"], part["function"]["name"], ""])
            calls[part["index"]][2] += part["function"]["arguments"]
    assert list(map(tuple, calls)) == all_calls(expected)

    parts = ReplyParts()  # the chat's own client
    read = Reply([event for frame in frames for event in parts.take(frame)], expected.parser)
    assert (read.reasoning, read.content) == (expected.reasoning, expected.content)
    assert all_calls(read) == all_calls(expected)
    reply = parts.reply(seed=None)
    assert (reply.reasoning, reply.content) == (expected.reasoning, expected.content)

    message = client.post("/v1/chat/completions", asked).json()["choices"][0]["message"]
    assert message.get("reasoning_content", "") == expected.reasoning
    assert (message["content"] or "") == expected.content
    whole = [(one["function"]["name"], one["function"]["arguments"]) for one in message.get("tool_calls", [])]
    assert whole == expected.calls

    asked = {
        "model": "k2",
        "max_tokens": 99,
        "thinking": {"type": "adaptive"},
        "messages": USER,
        "tools": [{"name": one["name"], "input_schema": one["parameters"]} for one in tools],
    }
    deltas = [event["delta"] for event in message_events(client, asked) if event["type"] == "content_block_delta"]
    assert "".join(delta.get("thinking", "") for delta in deltas) == expected.reasoning
    assert "".join(delta.get("text", "") for delta in deltas) == expected.content
    written = "".join(arguments for _, _, arguments in all_calls(expected))
    assert "".join(delta.get("partial_json", "") for delta in deltas) == written

    asked = {"input": "hello", "tools": [{"type": "function", **one} for one in tools]}
    output = response_events(client, asked)[-1]["response"]["output"]
    texts = {"reasoning": "", "message": "", "function_call": ""}
    for item in output:
        texts[item["type"]] += item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
    assert texts == {"reasoning": expected.reasoning, "message": expected.content, "function_call": written}
    json.dumps(output)


def test_every_dialect_says_what_the_parser_read(client: Client, service: ScriptedService) -> None:
    check(client, service)

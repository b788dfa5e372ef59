"""The dialect of Anthropic: what its requests become, and how replies are written, against a scripted service."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hybrid_k2.protocol import Tokenizer
from tests.server.conftest import Client
from tests.server.scripted import Script, ScriptedService
from tests.server.test_chat import THOUGHT, one_by_one

PATH = "/v1/messages"
HELLO: dict[str, Any] = {"model": "k2", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}
THINK = {"type": "enabled", "budget_tokens": 1024}
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = "Look.</think>Wait.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
CALL += '<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'


def events(client: Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post(PATH, {**body, "stream": True})
    assert response.status_code == 200, response.text
    *frames, rest = response.text.split("\n\n")
    assert rest == ""
    read = []
    for frame in frames:
        name, data = frame.split("\n")
        read.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {read[-1]['type']}"
    return read


def test_a_message(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
    body = client.post(PATH, {**HELLO, "thinking": THINK}).json()
    assert body["id"].startswith("msg_")
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "k2")
    thinking, text = body["content"]
    assert thinking["thinking"] == "I greet."
    assert thinking["signature"]
    assert text == {"type": "text", "text": "Hello! How are you?"}
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    assert body["usage"]["input_tokens"] + body["usage"]["cache_read_input_tokens"] == service.tickets[0].prompt_tokens
    assert service.requests[0].params.max_tokens == 100


def test_without_thinking_asked_for_it_answers_at_once(
    client: Client, service: ScriptedService, tokenizer: Tokenizer
) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "Hello<|im_end|>"))]
    body = client.post(PATH, HELLO).json()
    assert body["content"] == [{"type": "text", "text": "Hello"}]
    assert not service.requests[0].thinking


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_builds_the_message(
    client: Client, service: ScriptedService, tokenizer: Tokenizer, whole: bool
) -> None:
    tokens = one_by_one(tokenizer, CALL)
    steps = [[token for step in tokens for token in step]] if whole else tokens
    service.scripts = [Script(steps, progress=[(2, 9, 2)]) for _ in range(2)]
    asked = {**HELLO, "thinking": THINK, "tools": [WEATHER]}
    expected = client.post(PATH, asked).json()
    first, ping, *middle, delta, stop = events(client, asked)
    assert (first["type"], ping["type"], stop["type"]) == ("message_start", "ping", "message_stop")
    assert first["message"]["content"] == []
    assert first["message"]["usage"]["cache_read_input_tokens"] == 2
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta["usage"] == expected["usage"]
    blocks: list[dict[str, Any]] = []
    opened = False
    for event in middle:
        if event["type"] == "content_block_start":
            assert not opened
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
            opened, partial = True, ""
        elif event["type"] == "content_block_stop":
            assert event["index"] == len(blocks) - 1
            if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = json.loads(partial)
            opened = False
        else:
            assert opened
            change = event["delta"]
            if change["type"] == "input_json_delta":
                partial += change["partial_json"]
            else:
                field = change["type"].removesuffix("_delta")
                blocks[-1][field] += change[field]
    assert not opened
    assert blocks == expected["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]


def test_a_conversation_with_tools(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "Sunny<|im_end|>"))]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "x"},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Zürich"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    system = [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Now."},
    ]
    asked = {**HELLO, "messages": messages, "system": system, "tools": [WEATHER], "tool_choice": {"type": "auto"}}
    assert client.post(PATH, asked).status_code == 200
    request = service.requests[0]
    assert list(request.messages or ()) == [
        {"role": "system", "content": "Be brief.\n\nNow."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "I look.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sun"},
        {"role": "user", "content": [{"type": "text", "text": "Well?"}]},
    ]
    assert request.preserve_thinking
    assert [tool["function"]["name"] for tool in request.tools or ()] == ["get_weather"]


def test_an_error_of_a_tool_is_said(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "Oh<|im_end|>"))]
    use = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "no net", "is_error": True}
    messages = [*HELLO["messages"], {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    assert client.post(PATH, {**HELLO, "messages": messages}).status_code == 200
    assert list(service.requests[0].messages or ())[-1]["content"] == "Error: no net"


def test_a_begun_answer_is_continued(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "lo<|im_end|>"))]
    messages = [*HELLO["messages"], {"role": "assistant", "content": "Hel"}]
    assert client.post(PATH, {**HELLO, "messages": messages}).status_code == 200
    assert list(service.requests[0].messages or ())[-1]["partial"] is True


def test_stop_sequences(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "Hello! How are you?<|im_end|>"))]
    body = client.post(PATH, {**HELLO, "stop_sequences": ["How"]}).json()
    assert body["content"] == [{"type": "text", "text": "Hello! "}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "How")


def test_counting_tokens(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "Hello<|im_end|>"))]
    asked = {**HELLO, "system": "Be brief.", "tools": [WEATHER]}
    client.post(PATH, asked)
    counted = client.post(f"{PATH}/count_tokens", {name: asked[name] for name in asked if name != "max_tokens"})
    assert counted.json() == {"input_tokens": service.tickets[0].prompt_tokens}


def test_the_path_of_moonshot(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "Hello<|im_end|>"))]
    assert client.post(f"/anthropic{PATH}", HELLO).status_code == 200


def block(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
        (block(type="document", source={}), "messages[0].content[0].type"),
        (block(type="text", text=5), "messages[0].content[0].text"),
        (block(type="text", text="x", colour="red"), "messages[0].content[0].colour"),
        (block(type="tool_use", id="a", name="b", input={}), "messages[0].content[0].type"),
        (block(type="tool_result", tool_use_id="a", content=[{"type": "x"}]), "messages[0].content[0].content[0].type"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "thinking", "thinking": "x"}]}, "system[0].type"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"thinking": {"type": "sometimes"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{**WEATHER, "cost": 1}]}, "tools[0].cost"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "function": {"name": "a"}}]}, "tools[0].function"),
        ({"tools": [{**WEATHER, "input_schema": 5}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "strict": True, "input_schema": {"type": "colour"}}]}, "tools[0].input_schema.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "colour"}}}}, "output_config.format"),
        ({"tools": [WEATHER], "tool_choice": {"type": "all"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "auto", "x": 1}}, "tool_choice.x"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"output_config": {"effort": "none"}}, "output_config.effort"),
        ({"context_management": {"edits": [{"type": "x"}]}}, "context_management"),
        ({"service_tier": "priority"}, "service_tier"),
        *[({name: 1}, name) for name in ("mcp_servers", "container", "stop", "n", "top_logprobs")],
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(client: Client, change: dict[str, Any], param: str) -> None:
    response = client.post(PATH, {**HELLO, **change})
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(f"{param}: ")
    assert body["request_id"] == response.headers["x-request-id"]


def test_errors_speak_the_dialect(client: Client) -> None:
    response = client.post(PATH, {**HELLO, "model": "no-such-model"})
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"
    client.backend.drain()
    response = client.post(PATH, HELLO)
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "overloaded_error"

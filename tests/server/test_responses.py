"""OpenAI's Responses dialect against a scripted service."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hybrid_k2.errors import EngineError
from hybrid_k2.protocol import Tokenizer
from tests.server.conftest import Client
from tests.server.scripted import Script, ScriptedService
from tests.server.test_anthropic import CALL
from tests.server.test_chat import THOUGHT, one_by_one

PATH = "/v1/responses"
HELLO: dict[str, Any] = {"model": "k2", "input": "hello"}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def events(client: Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post(PATH, {**body, "stream": True})
    assert response.status_code == 200, response.text
    *frames, rest = response.text.split("\n\n")
    assert rest == ""
    read = [json.loads(frame.split("\n")[1].removeprefix("data: ")) for frame in frames]
    assert [frame.split("\n")[0] for frame in frames] == [f"event: {event['type']}" for event in read]
    assert [event["sequence_number"] for event in read] == list(range(len(read)))
    return read


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


def test_a_response(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
    body = client.post(PATH, HELLO).json()
    assert body["id"].startswith("resp_")
    assert (body["object"], body["status"], body["store"]) == ("response", "completed", False)
    reasoning, message = without_ids(body["output"])
    assert reasoning == {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "I greet."}],
        "status": "completed",
    }
    assert message["role"] == "assistant"
    assert message["content"] == [
        {"type": "output_text", "text": "Hello! How are you?", "annotations": [], "logprobs": []}
    ]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert list(service.requests[0].messages or ()) == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_builds_the_response(
    client: Client, service: ScriptedService, tokenizer: Tokenizer, whole: bool
) -> None:
    tokens = one_by_one(tokenizer, CALL)
    steps = [[token for step in tokens for token in step]] if whole else tokens
    service.scripts = [Script(steps) for _ in range(2)]
    asked = {**HELLO, "tools": [WEATHER]}
    expected = client.post(PATH, asked).json()
    created, in_progress, *middle, last = events(client, asked)
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert last["type"] == "response.completed"
    assert without_ids(last["response"]["output"]) == without_ids(expected["output"])
    assert [item["type"] for item in expected["output"]] == ["reasoning", "message", "function_call"]
    assert expected["output"][2]["arguments"] == '{"city": "Rome"}'
    for index, item in enumerate(last["response"]["output"]):
        own = [event for event in middle if event["output_index"] == index]
        assert (own[0]["type"], own[-1]["type"]) == ("response.output_item.added", "response.output_item.done")
        assert own[-1]["item"] == item
        assert {event["item_id"] for event in own[1:-1]} == {item["id"]}
        text = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        assert text == (item.get("arguments") or item["content"][0]["text"])


def test_the_output_can_be_sent_back(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, CALL)), Script(one_by_one(tokenizer, THOUGHT))]
    output = client.post(PATH, {**HELLO, "tools": [WEATHER]}).json()["output"]
    answer = {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "sun"}
    history = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}, *output, answer]
    response = client.post(PATH, {**HELLO, "input": history, "tools": [WEATHER], "instructions": "Be brief."})
    assert response.status_code == 200, response.text
    call = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert list(service.requests[1].messages or ()) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "Look.",
            "tool_calls": [{"id": "functions.get_weather:0", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": "sun"},
    ]


def test_a_response_that_is_cut_short(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT)[:6], finish_reason="length") for _ in range(2)]
    body = client.post(PATH, {**HELLO, "max_output_tokens": 6}).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][-1]["status"] == "incomplete"
    assert events(client, HELLO)[-1]["type"] == "response.incomplete"


def test_a_failure_in_mid_stream_is_the_last_event(
    client: Client, service: ScriptedService, tokenizer: Tokenizer
) -> None:
    script = Script(one_by_one(tokenizer, CALL)[:2], error=EngineError("/secret/path is gone"))
    service.scripts = [script, script]
    *_, last = events(client, HELLO)
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert "secret" not in json.dumps(last)
    assert client.post(PATH, HELLO).status_code == 500


@pytest.mark.parametrize("name", ["previous_response_id", "conversation"])
def test_what_was_stored_elsewhere_is_not_here(client: Client, name: str) -> None:
    response = client.post(PATH, {**HELLO, name: "resp_1"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    assert "send the whole conversation as input" in response.json()["error"]["message"]


def test_effort_none_does_not_think(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "Hello<|im_end|>"))]
    body = client.post(PATH, {**HELLO, "reasoning": {"effort": "none"}}).json()
    assert [item["type"] for item in body["output"]] == ["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}, "input[0].call_id"),
        ({"temperature": -1}, "temperature"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "colour"}}}}, "text.format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools[0].function"),
        ({"tools": [{**WEATHER, "parameters": 5}]}, "tools[0].parameters"),
        ({"tools": [{**WEATHER, "strict": True, "parameters": {"type": "colour"}}]}, "tools[0].parameters.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        *[({name: "x"}, name) for name in ("previous_response_id", "conversation", "prompt", "max_tool_calls")],
    ],
)
def test_a_wrong_parameter_is_named(client: Client, change: dict[str, Any], param: str) -> None:
    response = client.post(PATH, {**HELLO, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param

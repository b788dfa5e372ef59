"""What is wrong with a request is an error that says where; the server goes on."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from hybrid_k2.engine.service_types import QueueFullError
from hybrid_k2.server.options import Limits
from tests.server.conftest import Client
from tests.server.scripted import Script, ScriptedService
from tests.server.test_chat import HELLO, PATH, WEATHER, one_by_one


def error_of(client: Client, body: Any, status: int = 400, path: str = PATH) -> dict[str, Any]:
    response = client.post(path, body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert error["message"]
    return error


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def parts(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*content]}]}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


def schema_format(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": fields}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages[0].colour"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        (parts({"type": "text", "text": "x", "font": "y"}), "messages[0].content[0].font"),
        (parts({"type": "image_url", "image_url": {"url": "http://x/"}}), "messages[0].content[0].image_url.url"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 4097}, "stop_token_ids"),
        ({"logit_bias": {str(token): "x" for token in range(4097)}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 2, "01": 1}}, "logit_bias"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        (parts({"type": "input_audio", "input_audio": {}}), "messages[0].content[0].type"),
        (parts({"type": ["text"], "text": "x"}), "messages[0].content[0].type"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 10**40}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_all": True}}, "stream_options.include_all"),
        ({"return_progress": True}, "return_progress"),
        ({"tools": [WEATHER] * 2}, "tools[1].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name"),
        ({"tools": [function(name="a", parameters=5)]}, "tools[0].function.parameters"),
        ({"tools": [function(name="a", parameters=deep(100))]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": function(name="other")}, "tool_choice.function.name"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {"type": "array"}}}, "response_format.schema"),
        ({"tools": [WEATHER], "tool_choice": {**function(name="get_weather"), "x": 1}}, "tool_choice.x"),
        ({"tools": [WEATHER], "tool_choice": function(name="get_weather", x=1)}, "tool_choice.function.x"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": schema_format(name="x")}, "response_format.json_schema.schema"),
        ({"response_format": schema_format(schema=deep(100))}, "response_format.json_schema.schema"),
        ({"response_format": schema_format(schema={}, title="x")}, "response_format.json_schema.title"),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget": 5}}, "thinking.budget"),
        ({"thinking": {"type": "enabled", "keep": "some"}}, "thinking.keep"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "high"}, "reasoning_effort"),
        ({"thinking": {"type": "enabled"}, "enable_thinking": False}, "thinking"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"system": "x"}}, "chat_template_kwargs.system"),
        ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs.thinking"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"verbosity": "low"}, "verbosity"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
        ({"user": 5}, "user"),
        # What others know and this server does not.
        *[({name: 1}, name) for name in ("functions", "prediction", "audio", "web_search_options", "echo", "priority",
                                        "prompt_logprobs", "guided_json", "best_of", "chat_template", "bad_words")],
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(client: Client, change: dict[str, Any], param: str) -> None:
    error = error_of(client, {**HELLO, **change})
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert re.split(r"[.\[]", param)[0] in error["message"]


def test_null_counts_as_absent(client: Client, service: ScriptedService, tokenizer: Any) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "</think>yes<|im_end|>"))]
    nulls = dict.fromkeys(("temperature", "tools", "stop", "n", "functions", "response_format", "stream", "user"))
    message = {"role": "user", "content": "hello", "name": None, "tool_calls": None, "refusal": None}
    assert client.post(PATH, {**HELLO, **nulls, "messages": [message]}).status_code == 200


def test_a_reply_can_be_sent_back(client: Client, service: ScriptedService, tokenizer: Any) -> None:
    """With all the fields that libraries put into a message."""
    service.scripts = [Script(one_by_one(tokenizer, "a</think>b<|im_end|>")) for _ in range(2)]
    message = client.post(PATH, HELLO).json()["choices"][0]["message"]
    message |= {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    history = [*HELLO["messages"], message, {"role": "user", "content": "and?"}]  # type: ignore[misc]
    assert client.post(PATH, {**HELLO, "messages": history}).status_code == 200


@pytest.mark.parametrize(
    "call",
    [
        {"id": "call_1", "type": "function", "function": {"name": "get_weather"}},
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Ro'}},
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": [1, 2]}},
        {"type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
        {"id": "", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
    ],
)
def test_malformed_calls_of_the_history_are_taken(
    client: Client, service: ScriptedService, tokenizer: Any, call: dict[str, Any]
) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "</think>yes<|im_end|>"))]
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    response = client.post(PATH, {**HELLO, "messages": messages, "tools": [WEATHER]})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe{}",
        b'{"model": "k2", "model": "k3"}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"seed": ' + b"9" * 100_000 + b"}",
    ],
)
def test_a_body_that_is_no_json_object(client: Client, body: bytes) -> None:
    response = client.request("POST", PATH, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"
    assert len(response.content) < 1000


def test_numbers_that_are_none(client: Client) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = json.dumps(HELLO)[:-1] + f', "temperature": {number}}}'
        response = client.request("POST", PATH, content=body.encode())
        assert response.status_code == 400, number


def test_another_model_is_not_found(client: Client) -> None:
    error = error_of(client, {**HELLO, "model": "gpt-9"}, 404)
    assert (error["type"], error["code"], error["param"]) == ("not_found_error", "model_not_found", "model")
    assert client.get("/v1/models/gpt-9").status_code == 404


def test_no_such_route(client: Client) -> None:
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", PATH, "POST"),
        ("OPTIONS", PATH, "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("PUT", "/v1/files", "GET, HEAD, POST"),
        ("POST", "/v1/files/file-1", "GET, HEAD, DELETE"),
        ("BREW", "/", "GET, HEAD"),
        ("PATCH", "/anthropic/v1/messages", "POST"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(client: Client, method: str, path: str, allowed: str) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert response.json()["error"]["message"] == f"method: expected {allowed}, got '{method}'"


def test_every_method_of_a_route_can_be_told(client: Client) -> None:
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        allowed = client.request("BREW", path).headers["allow"].lower().split(", ")
        assert set(allowed) - {"head"} == set(operations), path
        assert ("head" in allowed) is ("get" in allowed), path


def test_lone_surrogates_are_no_trouble(client: Client, service: ScriptedService, tokenizer: Any) -> None:
    service.scripts = [Script(one_by_one(tokenizer, "</think>yes<|im_end|>"))]
    body = b'{"messages": [{"role": "user", "content": "\\ud800 \\udfff"}], "user": "\\ud800"}'
    assert client.request("POST", PATH, content=body).status_code == 200
    assert client.request("POST", PATH, content=b'{"messages": [], "\\ud800": 1}').status_code == 400
    assert client.request("POST", PATH, content=b'{"messages": [], "model": "\\ud800"}').status_code == 404


def test_full_queues(client: Client, service: ScriptedService) -> None:
    service.scripts = [
        Script(refusal=QueueFullError("queue: expected fewer", retry_after_s=2.2, reason=reason))
        for reason in ("key", "queue")
    ]
    response = client.post(PATH, HELLO)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.json()["error"]["type"] == "rate_limit_error"
    response = client.post(PATH, {**HELLO, "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["error"]["type"] == "overloaded_error"
    counted = client.get("/metrics").text
    assert 'hybrid_k2_admission_rejections_total{reason="queue_full"} 1.0' in counted


def test_limits_of_size(make_client: Callable[..., Client]) -> None:
    client = make_client(limits=Limits(body_bytes=1000, messages=3, tools=2, headers=20))
    assert client.post(PATH, {**HELLO, "user": "x" * 1000}).status_code == 413
    assert error_of(client, {**HELLO, "messages": HELLO["messages"] * 4})["param"] == "messages"  # type: ignore[operator]
    tools = [{"type": "function", "function": {"name": f"t{n}"}} for n in range(3)]
    assert error_of(client, {**HELLO, "tools": tools})["param"] == "tools"
    headers = {f"x-{n}": "y" for n in range(20)}
    assert client.get("/health", headers=headers).status_code == 431


def test_a_body_without_a_length_is_bounded_too(make_client: Callable[..., Client]) -> None:
    client = make_client(limits=Limits(body_bytes=1000))

    async def parts() -> Any:
        for _ in range(100):
            yield b"x" * 100

    assert client.request("POST", PATH, content=parts()).status_code == 413


def test_two_lengths_of_a_body_are_one_too_many(client: Client) -> None:
    body = json.dumps(HELLO).encode()
    headers = {"transfer-encoding": "chunked", "content-length": str(len(body))}
    response = client.request("POST", PATH, content=body, headers=headers)
    assert response.status_code == 400
    assert "got both" in response.json()["error"]["message"]
    assert response.headers["connection"] == "close"


def test_a_packed_body_is_refused(client: Client) -> None:
    body = gzip.compress(json.dumps(HELLO).encode())
    response = client.request("POST", PATH, content=body, headers={"content-encoding": "gzip"})
    assert response.status_code == 415
    assert response.json()["error"]["message"].startswith("content-encoding: ")


def test_headers_are_bounded_together(client: Client) -> None:
    headers = {f"x-{n}": "y" * 1000 for n in range(70)}
    assert client.get("/health", headers=headers).status_code == 431


def test_a_slow_body_times_out(make_client: Callable[..., Client]) -> None:
    import asyncio

    client = make_client(limits=Limits(body_s=0.05))

    async def parts() -> Any:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    assert client.request("POST", PATH, content=parts()).status_code == 408

"""Bodies with something wrong anywhere inside, in every dialect: a clear refusal, in bounded space."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_k2.protocol import ImageFormat, Tokenizer
from tests.pictures import coded, noise_png, uri
from tests.server.conftest import Client
from tests.server.scripted import Script, ScriptedService
from tests.server.test_chat import PATH, THOUGHT, WEATHER, one_by_one
from tests.server.test_hostile import JSON, Endless

FUNCTION: dict[str, Any] = dict(WEATHER["function"])
PARAMETERS: dict[str, Any] = FUNCTION["parameters"]
CALL = {"id": "functions.get_weather:0", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
IMAGE = noise_png(32, 20)
INPUT_IMAGE = {"type": "input_image", "image_url": uri(IMAGE), "detail": "auto"}
BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": coded(IMAGE)}}
# Bodies in which every route's fields are used, the parts of the fields too.
RICH: dict[str, dict[str, Any]] = {
    PATH: {
        "model": "k2",
        "messages": [
            {"role": "system", "content": "a"},
            {
                "role": "user",
                "name": "b",
                "content": [
                    {"type": "text", "text": "c", "cache_control": None},
                    {"type": "image_url", "image_url": {"url": uri(IMAGE), "detail": "low"}},
                ],
            },
            {"role": "assistant", "content": "d", "reasoning_content": "e", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": CALL["id"], "content": [{"type": "text", "text": "f"}]},
            {"role": "assistant", "content": "g", "partial": True},
        ],
        "tools": [
            {"type": "function", "function": {**FUNCTION, "description": "h", "strict": False}},
            {"type": "builtin_function", "function": {"name": "$web_search"}},
        ],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "thinking": {"type": "disabled", "keep": "all"},
        "chat_template_kwargs": {"thinking": False},
        "stop": ["i"],
        "stop_token_ids": [5],
        "logit_bias": {"7": 1.5},
        "response_format": {"type": "json_schema", "json_schema": {"name": "j", "strict": True, "schema": PARAMETERS}},
        "metadata": {"k": "l"},
    },
    "/v1/messages": {
        "model": "k2",
        "max_tokens": 50,
        "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "b", "citations": None}, BLOCK]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "c", "signature": "d"},
                    {"type": "text", "text": "e"},
                    {"type": "tool_use", "id": "f", "name": "get_weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "f",
                        "is_error": True,
                        "content": [{"type": "text", "text": "g"}, BLOCK],
                    }
                ],
            },
        ],
        "tools": [{"name": "get_weather", "description": "h", "input_schema": PARAMETERS, "strict": False}],
        "tool_choice": {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "stop_sequences": ["i"],
        "output_config": {"effort": "high"},
        "metadata": {"user_id": "j"},
    },
    "/v1/responses": {
        "model": "k2",
        "instructions": "a",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "b"}, INPUT_IMAGE]},
            {"type": "reasoning", "id": "c", "summary": [], "content": [{"type": "reasoning_text", "text": "d"}]},
            {"type": "function_call", "call_id": "e", "name": "get_weather", "arguments": "{}", "status": "completed"},
            {
                "type": "function_call_output",
                "call_id": "e",
                "output": [{"type": "input_text", "text": "f"}, INPUT_IMAGE],
            },
        ],
        "tools": [{"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": False}],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "reasoning": {"effort": "high", "summary": "auto"},
        "text": {"format": {"type": "json_schema", "name": "g", "schema": PARAMETERS}, "verbosity": "medium"},
        "include": ["message.output_text.logprobs"],
        "metadata": {"h": "i"},
    },
    "/v1/completions": {"model": "k2", "prompt": [[5, 6], "a"], "stop": ["b"], "logit_bias": {"7": 1}},
    "/v1/tokenizers/estimate-token-count": {"model": "k2", "messages": [{"role": "user", "content": "a"}]},
}


@pytest.fixture
def answering(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> Client:
    service.images = ImageFormat()
    service.scripts = Endless(Script(one_by_one(tokenizer, THOUGHT)[:4]))
    return client


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in inner:
        yield (*place, step)
        yield from places(one, (*place, step))


def put(body: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(body)
    holder = changed
    for step in place[:-1]:
        holder = holder[step]
    holder[place[-1]] = value
    return changed  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", RICH)
def test_the_bodies_are_good(answering: Client, path: str) -> None:
    response = answering.post(path, RICH[path])
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [path for path in RICH if "estimate" not in path])
def test_any_value_anywhere(answering: Client, path: str, stream: bool) -> None:
    everywhere = list(places(RICH[path]))

    @settings(max_examples=200, suppress_health_check=list(HealthCheck), deadline=None)
    @given(
        place=st.sampled_from(everywhere),
        value=JSON | st.sampled_from(["", [], {}, [[]], 0, -1, 2**70, True, "\ud800"]),
    )
    def call(place: tuple[Any, ...], value: Any) -> None:
        body = put(RICH[path], place, value) | {"stream": stream}
        response = answering.request("POST", path, content=json.dumps(body).encode())
        assert response.status_code in (200, 400, 404), (place, value, response.text)

    call()


@pytest.mark.parametrize("kind", [[], {}, {"a": 1}, 5, None])
@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/v1/messages", ("messages", 0, "content", 0, "type")),
        ("/v1/messages", ("messages", 2, "content", 0, "content", 0, "type")),
        ("/v1/messages", ("system", 0, "type")),
        ("/v1/responses", ("input", 0, "type")),
    ],
)
def test_a_type_that_is_no_text(answering: Client, path: str, place: tuple[Any, ...], kind: Any) -> None:
    response = answering.post(path, put(RICH[path], place, kind))
    assert response.status_code == 400, response.text
    assert "type" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", RICH)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_what_json_cannot_say_is_refused_anywhere(answering: Client, path: str, number: str, stream: bool) -> None:
    body = {**RICH[path], "metadata": {"a": ["NUMBER"]}, "stream": stream}
    response = answering.request("POST", path, content=json.dumps(body).replace('"NUMBER"', number).encode())
    assert (response.status_code, "body: expected valid JSON" in response.text) == (400, True), response.text


@pytest.mark.parametrize("size", [0, 100_000])  # the larger ones are parsed on a thread, with a stack of its own
@pytest.mark.parametrize("levels", [126, 127, 200, 950, 5000])
@pytest.mark.parametrize(
    ("path", "place"),
    [
        (PATH, ("messages", 2, "tool_calls", 0, "function", "arguments")),
        (PATH, ("metadata", "k")),
        ("/v1/messages", ("messages", 1, "content", 2, "input")),
        ("/v1/messages", ("metadata", "user_id")),
        ("/v1/responses", ("metadata", "h")),
        ("/v1/responses", ("input", 3, "output")),
        ("/v1/completions", ("prompt",)),
    ],
)
def test_depth_anywhere(answering: Client, path: str, place: tuple[Any, ...], levels: int, size: int) -> None:
    for deep in ("[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels):
        body = json.dumps(put(RICH[path], place, "DEEP")).replace('"DEEP"', deep) + " " * size
        response = answering.request("POST", path, content=body.encode())
        assert response.status_code in (200, 400), (levels, response.text)
        if levels > 127:
            assert response.json()["error"]["message"].startswith("body: expected"), response.text


@pytest.mark.parametrize("value", ["[],", "0,", "{},"])
def test_small_values_without_end_are_refused_before_they_take_memory(answering: Client, value: str) -> None:
    body = f'{{"messages": [], "metadata": {{"a": [{value * 10**6} 0, 0]}}}}'.encode()
    assert answering.request("POST", PATH, content=body).status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        lambda name: {name: 1},
        lambda name: {"messages": [{"role": "user", "content": "a", name: 1}]},
        lambda name: {"messages": [{"role": name, "content": "a"}]},
        lambda name: {"messages": [], "model": name},
        lambda name: {"messages": [], "chat_template_kwargs": {name: 1}},
        lambda name: {"messages": [], "tools": [{"type": "function", "function": {"name": "a", name: 1}}]},
        lambda name: {"messages": [], "stop": [name]},
        lambda name: {"messages": [{"role": "user", "content": "a"}], "logit_bias": {name: 1}},
    ],
)
def test_a_long_name_is_not_sent_back(answering: Client, body: Any) -> None:
    response = answering.post(PATH, body("n" * 100_000))
    assert response.status_code in (400, 404)
    assert len(response.content) < 2000


def test_a_long_key_that_comes_twice(answering: Client) -> None:
    key = json.dumps("k" * 100_000)
    response = answering.request("POST", PATH, content=f"{{{key}: 1, {key}: 2}}".encode())
    assert response.status_code == 400
    assert "twice" in response.text
    assert len(response.content) < 1000


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"function": {"name": "a"}, "colour": "red"}, "tools[0].colour"),
        ({"function": {"name": "a", "colour": "red"}}, "tools[0].function.colour"),
    ],
)
def test_unknown_fields_of_tools_are_named(answering: Client, change: dict[str, Any], param: str) -> None:
    tools = [{"type": "function", **change}]
    response = answering.post(PATH, {"messages": [{"role": "user", "content": "a"}], "tools": tools})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)

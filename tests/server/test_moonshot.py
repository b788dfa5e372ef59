"""`--strict-moonshot`: what the official API refuses for K2.6, with the words that its testers look for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hybrid_k2.protocol import Tokenizer
from tests.server.conftest import Client
from tests.server.scripted import Script, ScriptedService
from tests.server.test_chat import HELLO, PATH, THOUGHT, WEATHER, one_by_one

OFF = {"thinking": {"type": "disabled"}}
CALL = {"id": "functions.get_weather:0", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}


def history(**fields: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL], **fields},
            {"role": "tool", "tool_call_id": CALL["id"], "content": "sun"},
        ]
    }


@pytest.fixture
def strict(make_client: Callable[..., Client]) -> Client:
    return make_client(strict_moonshot=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 1.1}, "invalid temperature: only 1 is allowed for this model"),
    ({"temperature": 2.0}, "invalid temperature: only 1 is allowed for this model"),
    ({**OFF, "temperature": 1.0}, "invalid temperature: only 0.6 is allowed for this model"),
    ({"top_p": 0.8}, "invalid top_p: only 0.95 is allowed for this model"),
    ({"presence_penalty": 0.5}, "invalid presence_penalty: only 0 is allowed for this model"),
    ({"frequency_penalty": 0.5}, "invalid frequency_penalty: only 0 is allowed for this model"),
    ({"n": 2}, "invalid n: only 1 is allowed for this model"),
    ({"stop": ["a", "b", "c", "d", "e", "f"]}, "stop: expected at most 5 strings"),
    ({"stop": "x" * 33}, "stop: expected strings of at most 32 bytes"),
    ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice 'required' is incompatible with thinking enabled"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        "tool_choice 'specified' is incompatible with thinking enabled",
    ),
    ({"tools": [{"type": "function", "function": {"name": "ab"}}]}, "function name is invalid"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}, "text content is empty"),
    (
        history(),
        "thinking is enabled but reasoning_content is missing in assistant tool call message at index 1",
    ),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_refusals(strict: Client, change: dict[str, Any], words: str) -> None:
    response = strict.post(PATH, {**HELLO, **change})
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_without_the_flag_they_are_answered(
    client: Client, service: ScriptedService, tokenizer: Tokenizer, change: dict[str, Any], words: str
) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT)) for _ in range(2)]
    assert client.post(PATH, {**HELLO, **change}).status_code == 200, words


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1.0, "top_p": 0.95, "n": 1, "presence_penalty": 0, "frequency_penalty": 0},
        {**OFF, "temperature": 0.6, "tools": [WEATHER], "tool_choice": "required"},
        history(reasoning_content="I look."),
        {**OFF, **history()},
    ],
)
def test_what_the_official_api_takes(
    strict: Client, service: ScriptedService, tokenizer: Tokenizer, change: dict[str, Any]
) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
    message = strict.post(PATH, {**HELLO, **change}).json()["choices"][0]["message"]
    assert "reasoning" not in message


def test_thinking_and_effort_together_are_refused_in_its_words(strict: Client) -> None:
    both = {"thinking": {"type": "enabled"}, "reasoning_effort": "high"}
    error = strict.post(PATH, {**HELLO, **both}).json()["error"]
    assert "cannot specify both 'thinking' and 'reasoning_effort'" in error["message"]

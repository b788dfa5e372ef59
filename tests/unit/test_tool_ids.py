"""Ids of tool calls: histories of every kind reach the model in its own form, and new calls get new ids."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_k2.errors import RequestError
from hybrid_k2.protocol import OutputParser, canonical_history, encode_prompt, render
from tests.protocol_strategies import conversations, joined, small_tokenizer

NAMES = ["exec", "get_weather", "a", "a:1", "mcp__files-read"]


def call(call_id: str | None, name: str | None, arguments: Any = "{}") -> dict[str, Any]:
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    return ({} if call_id is None else {"id": call_id}) | {"type": "function", "function": function}


def asks(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": list(calls)}


def result(call_id: str | None, content: str = "ok", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more} | ({} if call_id is None else {"tool_call_id": call_id})


USER = {"role": "user", "content": "Go."}


@st.composite
def tool_conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Conversations as K2.6 has them: ids count all calls, and results come in any order."""
    messages: list[dict[str, Any]] = []
    number = 0
    for _ in range(draw(st.integers(0, 4))):
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3))
        ids = [f"functions.{name}:{number + place}" for place, name in enumerate(names)]
        number += len(names)
        messages += [USER, asks(*(call(one, name) for one, name in zip(ids, names, strict=True)))]
        messages += [result(one, f"of {one}") for one in draw(st.permutations(ids))]
    return messages


def renamed(messages: list[dict[str, Any]], new: Callable[[str], str]) -> list[dict[str, Any]]:
    """Give every call and its result another id, as a client or a gateway would."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for one in message.get("tool_calls", ()):
            one["id"] = new(one["id"])
        if "tool_call_id" in message:
            message["tool_call_id"] = new(message["tool_call_id"])
    return messages


def ids_of(messages: Any) -> list[str]:
    return [one["id"] for message in messages for one in message.get("tool_calls") or ()]


@given(tool_conversations())
def test_ids_of_the_models_form_stay_as_they_are(messages: list[dict[str, Any]]) -> None:
    assert canonical_history(messages)[0] == messages


@given(tool_conversations(), st.sampled_from(["call_{}", "toolu_{}", "functions{}", "{}", "functions_x_{}", "a b\n{}"]))
def test_foreign_ids_become_those_that_the_model_would_have_written(messages: list[dict[str, Any]], form: str) -> None:
    """The prompt is then the one that the checkpoint's template gives for the model's own ids."""
    numbers: dict[str, int] = {}
    foreign = renamed(messages, lambda one: form.format(numbers.setdefault(one, len(numbers) + 7)))
    before = copy.deepcopy(foreign)
    canonical = canonical_history(foreign)[0]
    assert canonical == messages
    assert render(canonical) == render(messages)
    assert foreign == before


@settings(max_examples=300)
@given(conversations())
def test_any_conversation_gets_unique_ids_of_the_models_form(messages: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(messages)
    canonical = canonical_history(messages)[0]
    assert messages == before
    ids = ids_of(canonical)
    assert len(set(ids)) == len(ids)
    names = [one["function"]["name"] for message in messages for one in message.get("tool_calls") or ()]
    for one, name in zip(ids, names, strict=True):
        assert re.fullmatch(rf"functions\.{re.escape(name)}:[0-9]+", one)
    assert canonical_history(canonical)[0] == canonical
    for length in range(len(messages)):  # so that the next turn finds the prompt of this one in the cache
        assert canonical_history(messages[:length])[0] == canonical[:length]
    without = [{**message, "tool_calls": None, "tool_call_id": None} for message in messages]
    assert [{**message, "tool_calls": None, "tool_call_id": None} for message in canonical] == without


@pytest.mark.parametrize("written", ["call_2", "3", "functionsexec5", "functions_get_weather_1", "functions.other:0"])
def test_the_forms_that_models_and_gateways_are_known_to_write(written: str) -> None:
    canonical = canonical_history([USER, asks(call(written, "get_weather")), result(written)])[0]
    assert ids_of(canonical) == ["functions.get_weather:0"]
    assert canonical[2]["tool_call_id"] == "functions.get_weather:0"


def test_ids_used_again_in_every_turn_are_told_apart() -> None:
    turns = [
        USER,
        asks(call("call_1", "a")),
        result("call_1", "one"),
        asks(call("call_1", "b")),
        result("call_1", "two"),
    ]
    canonical = canonical_history(turns)[0]
    assert ids_of(canonical) == ["functions.a:0", "functions.b:1"]
    assert [message["tool_call_id"] for message in canonical if message["role"] == "tool"] == ids_of(canonical)


def test_a_missing_result_does_not_shift_the_later_ones() -> None:
    turns = [asks(call("call_1", "a")), USER, asks(call("call_1", "a")), result("call_1")]
    assert canonical_history(turns)[0][3]["tool_call_id"] == "functions.a:1"


def test_one_id_for_two_calls_of_a_message_goes_by_order() -> None:
    turns = [asks(call("x", "a"), call("x", "b")), result("x"), result("x"), result("x")]
    results = [message["tool_call_id"] for message in canonical_history(turns)[0][1:]]
    assert results == ["functions.a:0", "functions.b:1", "functions.b:1"]


def test_results_without_a_known_id_find_their_call() -> None:
    turns = [
        asks(call("x", "a"), call("y", "b"), call("z", "c")),
        result(None, name="b"),
        result("?", name=""),
        result("z"),
    ]
    results = [message["tool_call_id"] for message in canonical_history(turns)[0][1:]]
    assert results == ["functions.b:1", "functions.a:0", "functions.c:2"]
    assert canonical_history([USER, result("nowhere")])[0] == [USER, result("nowhere")]


def test_calls_without_an_id_or_a_name() -> None:
    turns = [asks(call(None, "a"), call("functions.b:7", None), call("c:3", None), call("call_9", None)), result("c:3")]
    canonical = canonical_history(turns)[0]
    assert ids_of(canonical) == ["functions.a:0", "functions.b:7", "functions.c:8", "call_9"]
    assert canonical[1]["tool_call_id"] == "functions.c:8"


def test_huge_numbers_are_not_the_models_form() -> None:
    huge = f"functions.a:{'9' * 5000}"
    assert ids_of(canonical_history([asks(call(huge, "a"))])[0]) == ["functions.a:0"]


@pytest.mark.parametrize("given", ["x", "functions.a:0", None])
def test_time_is_linear_in_the_calls_whatever_their_ids(given: str | None) -> None:
    count = 20_000
    turns = [asks(*(call(given, "a") for _ in range(count))), *(result(given) for _ in range(count))]
    start = time.process_time()
    canonical = canonical_history(turns)[0]
    assert time.process_time() - start < 5  # 0.1 s; a search through the calls for each result takes a minute
    assert [message["tool_call_id"] for message in canonical[1:]] == ids_of(canonical)
    assert len(set(ids_of(canonical))) == count


@pytest.mark.parametrize("part", [":0", ":", "0", "functions.", "functions.a:"])
def test_time_is_linear_in_the_length_of_an_id(part: str) -> None:
    start = time.process_time()
    for end in ("", "x", ":"):
        canonical_history([asks(call(part * 300_000 + end, None), call(part * 300_000 + end, "a"))])
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(None, "{}"), ('{"city": "Os', '{"city": "Os'), ([1, 2], "[1, 2]"), (7, "7"), ("", ""), ("no JSON", "no JSON")],
)
def test_malformed_histories_still_make_a_prompt(arguments: Any, text: str) -> None:
    turns = [USER, asks(call("call_1", "clock", arguments)), result("call_1")]
    tokenizer = small_tokenizer()
    ids = encode_prompt(tokenizer, canonical_history(turns)[0])
    written = f"functions.clock:0<|tool_call_argument_begin|>{text}<|tool_call_end|>"
    assert written in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "messages", ["text", b"bytes", {"role": "user"}, None, 7, [7], [{"role": "assistant", "tool_calls": [7]}]]
)
def test_what_is_no_conversation_is_left_to_be_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        render(canonical_history(messages)[0])


# -- replies


def replied(history: list[dict[str, Any]], *headers: str) -> list[str]:
    """Parse a reply with one call for each header; return the ids that the client sees."""
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("a", "b")]
    parser = OutputParser(small_tokenizer(), tools, thinking=False, call_ids=canonical_history(history)[1])
    calls = [f"<|tool_call_begin|>{one}<|tool_call_argument_begin|>{{}}<|tool_call_end|>" for one in headers]
    text = f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"
    events = parser.feed_text(text) + parser.finish()
    by_character = OutputParser(small_tokenizer(), tools, thinking=False, call_ids=canonical_history(history)[1])
    pieces = [event for character in text for event in by_character.feed_text(character)] + by_character.finish()
    assert joined(pieces) == joined(events)
    begun = {event.index: event.id for event in events if event.kind == "tool_call_begin"}
    assert all(event.id == begun[event.index] for event in events if event.index is not None)
    return [call_id or "" for _, call_id in sorted(begun.items(), key=lambda item: item[0] or 0)]


TWO_CALLS = [USER, asks(call("call_x", "a"), call("call_y", "b")), result("call_x"), result("call_y")]


@pytest.mark.parametrize(
    ("history", "headers", "ids"),
    [
        ([USER], ["functions.a:0", "functions.b:1"], ["functions.a:0", "functions.b:1"]),
        (TWO_CALLS, ["functions.a:2"], ["functions.a:2"]),
        (TWO_CALLS, ["functions.a:0"], ["functions.a:2"]),  # the model began to count again
        (TWO_CALLS, ["functions.a:9", "functions.a:9"], ["functions.a:9", "functions.a:10"]),
        ([USER], ["functionsa5", "b", "functions_a_1"], ["functions.a:0", "functions.b:1", "functions.a:2"]),
    ],
)
def test_ids_of_replies_are_of_the_models_form_and_new(history: Any, headers: list[str], ids: list[str]) -> None:
    assert replied(history, *headers) == ids
    again = [*history, asks(*(call(one, one.split(".")[1].split(":")[0]) for one in ids))]
    assert ids_of(canonical_history(again)[0][-1:]) == ids  # sent back, they stay as they are


def test_two_replies_to_one_conversation_do_not_share_their_count() -> None:
    assert replied(TWO_CALLS, "a") == replied(TWO_CALLS, "a") == ["functions.a:2"]
    ids = canonical_history(TWO_CALLS)[1]
    parsers = [OutputParser(small_tokenizer(), None, thinking=False, call_ids=ids) for _ in range(2)]
    for parser in parsers:
        text = "<|tool_call_begin|>functions.a:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        assert {event.id for event in parser.feed_text(text)} == {"functions.a:2"}

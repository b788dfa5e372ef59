"""Grammars through the engine: what the demo model writes under one, and what a request cannot combine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybrid_k2.engine import Engine, Grammar, SamplingParams
from hybrid_k2.engine.request import chat_sequences
from hybrid_k2.errors import RequestError

pytest.importorskip("llguidance", reason="llguidance is not installed")

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
        "unit": {"enum": ["one", "ten"]},
    },
    "required": ["sum", "sure", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"digit": {"enum": [1, 2, 3]}, "way": {"enum": ["up", "down"]}},
                "required": ["digit", "way"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("turn", "move")
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    with Engine.load("demo") as engine:
        yield engine


def test_grammars_are_prepared_once(demo: Engine) -> None:
    demo.prepare_grammars()
    before = demo.loaded.guide_vocabulary
    demo.prepare_grammars()
    demo.chat(QUESTION, thinking=False, params=SamplingParams(max_tokens=5, grammar=Grammar.json_object()))
    assert demo.loaded.guide_vocabulary is before


def check(value: Any) -> None:
    assert list(value) == ["sum", "sure", "unit"]
    assert 0 <= value["sum"] <= 99
    assert isinstance(value["sure"], bool)
    assert value["unit"] in ("one", "ten")


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("thinking", [True, False])
def test_the_content_fits_its_schema_and_the_thinking_is_free(demo: Engine, thinking: bool, temperature: float) -> None:
    free = demo.chat(QUESTION, thinking=thinking, params=SamplingParams(temperature=0, max_tokens=300))
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=400, grammar=Grammar.json_schema(SCHEMA))
    reply = demo.chat(QUESTION, thinking=thinking, params=params)
    check(json.loads(reply.content))
    assert reply.finish_reason == "stop"
    if temperature == 0:
        assert reply.reasoning == free.reasoning


def test_a_prompt_is_continued_under_a_grammar(demo: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, grammar=Grammar.json_schema(SCHEMA), logprobs=1)
    with demo.generate("Seventeen and twenty-five as JSON: ", params=params) as generation:
        for _ in generation:
            pass
    check(json.loads(generation.reply.content))
    assert generation.reply.finish_reason == "stop"
    assert generation.reply.logprobs is not None
    assert any(read.top[0].token_id != read.token_id for read in generation.reply.logprobs)  # the model's own, unmasked


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(("choice", "names"), [("required", {"turn", "move"}), ("move", {"move"})])
def test_a_call_that_must_come_comes_and_is_whole(demo: Engine, thinking: bool, choice: str, names: set[str]) -> None:
    grammar = Grammar.tools(TOOLS, choice, parallel=False)
    params = SamplingParams(temperature=0, max_tokens=400, grammar=grammar)
    reply = demo.chat(QUESTION, tools=TOOLS, thinking=thinking, params=params)
    assert reply.finish_reason == "tool_calls"
    assert reply.content == ""
    assert bool(reply.reasoning) == thinking
    (call,) = reply.tool_calls
    assert call.name in names
    value = json.loads(call.arguments)
    assert value["digit"] in (1, 2, 3)
    assert value["way"] in ("up", "down")
    assert call.id.startswith(f"functions.{call.name}:")


def test_auto_changes_no_token_of_an_answer_without_calls(demo: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=300)
    free = demo.chat(QUESTION, params=params)
    assert demo.chat(QUESTION, params=replace(params, grammar=Grammar.tools(TOOLS))).token_ids == free.token_ids


def test_auto_binds_the_calls_of_a_model_that_would_call_another_tool(demo: Engine) -> None:
    """The demo model learned other tools than these."""
    params = SamplingParams(temperature=0, max_tokens=300, grammar=Grammar.tools(TOOLS))
    reply = demo.chat(QUESTION, tools=TOOLS, thinking=False, params=params)
    assert reply.tool_calls
    for call in reply.tool_calls:
        assert call.name in ("turn", "move")
        assert json.loads(call.arguments)["digit"] in (1, 2, 3)
    assert "functions" not in reply.content


@pytest.mark.parametrize("thinking", [True, False])
def test_calls_or_a_content_that_fits(demo: Engine, thinking: bool) -> None:
    grammar = Grammar.json_schema(SCHEMA).or_calls(TOOLS)
    for seed in range(4):
        params = SamplingParams(seed=seed, max_tokens=400, grammar=grammar)
        reply = demo.chat(QUESTION, tools=TOOLS, thinking=thinking, params=params)
        assert bool(reply.content) is not bool(reply.tool_calls)
        if reply.content:
            assert json.loads(reply.content).keys() == SCHEMA["properties"].keys()  # type: ignore[attr-defined]
        for call in reply.tool_calls:
            assert json.loads(call.arguments)["way"] in ("up", "down")
    with pytest.raises(RequestError, match="grammar: expected one for content with a prompt"):
        demo.generate("x", params=SamplingParams(grammar=grammar))


def test_a_token_that_is_forbidden_never_comes(demo: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    free = demo.chat(QUESTION, params=params)
    bias = dict.fromkeys(free.token_ids, 100.0)  # no bias can bring them back
    other = demo.chat(QUESTION, params=replace(params, forbidden_token_ids=free.token_ids, logit_bias=bias))
    assert not set(other.token_ids) & set(free.token_ids)
    with pytest.raises(RequestError, match="forbidden_token_ids: expected token ids from 0 to"):
        demo.chat(QUESTION, params=SamplingParams(forbidden_token_ids=[10**6]))


def test_forbidden_tokens_beside_a_grammar_and_least_tokens(demo: Engine) -> None:
    one, two = (demo.tokenizer.encode(text)[0] for text in "12")
    params = SamplingParams(temperature=0, max_tokens=9, grammar=Grammar.json_schema({"enum": [1, 2]}))
    for forbidden, content in ((one, "2"), (two, "1")):
        reply = demo.chat(QUESTION, thinking=False, params=replace(params, forbidden_token_ids=[forbidden]))
        assert reply.content == content
    with pytest.raises(RequestError, match="forbidden_token_ids: expected a token that may come"):
        demo.chat(QUESTION, thinking=False, params=replace(params, forbidden_token_ids=[one, two]))
    reply = demo.chat(QUESTION, params=SamplingParams(min_tokens=7, max_tokens=7, forbidden_token_ids=[one]))
    assert len(reply.token_ids) == 7
    assert one not in reply.token_ids


def test_least_tokens_give_way_where_the_grammar_is_at_its_end(demo: Engine) -> None:
    grammar = Grammar.json_schema({"const": 7})
    params = SamplingParams(temperature=0, min_tokens=30, max_tokens=50, grammar=grammar)
    reply = demo.chat(QUESTION, thinking=False, params=params)
    assert (reply.content, reply.finish_reason) == ("7", "stop")


def test_sampling_parameters_cannot_break_a_grammar(demo: Engine) -> None:
    (brace,) = demo.tokenizer.encode("{")
    grammar = Grammar.json_schema({"enum": ["a", "b"]})
    params = SamplingParams(
        temperature=5.0, top_p=0.01, repetition_penalty=2.0, logit_bias={brace: 100.0}, max_tokens=20, grammar=grammar
    )
    assert demo.chat(QUESTION, thinking=False, params=params).content in ('"a"', '"b"')


@pytest.mark.parametrize("thinking", [True, False])
def test_what_cannot_be_combined_is_refused(demo: Engine, thinking: bool) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": '{"a', "partial": True}]
    content = SamplingParams(grammar=Grammar.json_object())
    with pytest.raises(RequestError, match="grammar: expected a reply from its beginning, got a partial message"):
        demo.chat(begun, thinking=thinking, params=content)
    with pytest.raises(RequestError, match="grammar: expected one for content with a prompt"):
        demo.generate("x", params=SamplingParams(grammar=Grammar.tools(TOOLS)))
    with pytest.raises(RequestError, match="ignore_eos: expected False beside a grammar"):
        SamplingParams(grammar=Grammar.json_object(), ignore_eos=True)
    with pytest.raises(RequestError, match="grammar: expected a Grammar"):
        SamplingParams(grammar={"type": "object"})  # type: ignore[arg-type]


def test_a_grammar_that_exceeds_its_bounds_ends_its_sequence_with_an_error_of_the_request(demo: Engine) -> None:
    """The pattern has more than 2**40 states; the limits stop it."""
    grammar = Grammar.json_schema({"type": "string", "pattern": "^(.*a.{40}){3}$"})

    def write() -> None:
        for _ in range(20):  # by chance, one or another comes to its end before
            (sequence,) = chat_sequences(demo.loaded, QUESTION, None, False, False, SamplingParams(grammar=grammar))
            sequence.max_tokens = 10**6
            while sequence.finish_reason is None:
                sequence.sample(torch.randn(demo.config.vocab_size))

    with pytest.raises(RequestError, match="grammar: expected it within its bounds, got: lexer error: too many states"):
        write()

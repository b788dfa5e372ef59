"""Grammars on small vocabularies: masks against every text that fits, random replies against jsonschema."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hybrid_k2.engine.grammar import Grammar
from hybrid_k2.engine.guide import Guide, GuideVocabulary
from hybrid_k2.errors import RequestError
from hybrid_k2.protocol import OutputParser, Tokenizer
from tests.guides import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    CALL_END,
    SECTION_BEGIN,
    SECTION_END,
    advanced,
    allowed,
    encoded,
    guide,
    tool,
    vocabulary,
)
from tests.protocol_strategies import real_tokenizer, small_tokenizer

pytest.importorskip("llguidance", reason="llguidance is not installed")

# -- every mask against the list of all texts

FINITE = [
    {"enum": ["a", "ab", "abc", "b\n", 'q"', "é", "日本", ""]},
    {"enum": [1, 12, 123, -1, True, None, "1"]},
    {"const": "one"},
    {"type": "boolean"},
    {"type": "integer", "minimum": -3, "maximum": 120},
    {"type": "string", "pattern": "^[ab]{1,3}$"},
    {"anyOf": [{"const": "true"}, {"type": "boolean"}, {"type": "null"}]},
]


def texts_of(schema: dict[str, Any]) -> list[str]:
    """List all texts of a schema whose values are scalars."""
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    if values is None and "anyOf" in schema:
        return [text for option in schema["anyOf"] for text in texts_of(option)]
    if values is None and "pattern" in schema:
        values = ["".join(parts) for parts in _products("ab", 3)]
    if values is None:
        integers = list(range(schema.get("minimum", 0), schema.get("maximum", 0) + 1))
        values = {"boolean": [True, False], "null": [None], "integer": integers}[schema["type"]]
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    texts += ["-0"] if schema.get("minimum", 0) < 0 else []
    return [text.replace("\\n", newline) for text in texts for newline in ("\\n", "\\u000a", "\\u000A")]


def _products(letters: str, longest: int) -> Iterator[tuple[str, ...]]:
    done: list[tuple[str, ...]] = [()]
    for _ in range(longest):
        done = [(*parts, letter) for parts in done for letter in letters]
        yield from done


@pytest.mark.parametrize("schema", FINITE, ids=json.dumps)
def test_a_mask_has_exactly_the_tokens_that_lead_to_a_text_of_the_schema(schema: dict[str, Any]) -> None:
    tokenizer = small_tokenizer()
    texts = {text.encode() for text in texts_of(schema)}
    pieces = {token: tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    chance = random.Random()
    for _ in range(12):
        one, written = guide(Grammar.json_schema(schema)), b""
        while True:
            fitting = {
                token
                for token, piece in pieces.items()
                if token not in tokenizer.special_ids and any(text.startswith(written + piece) for text in texts)
            }
            expected = fitting | (set(vocabulary().end_ids) if written in texts else set())
            found = allowed(one)
            if found != expected:  # where the next bytes are forced, so is the token that the tokenizer has for them
                (token,) = found
                assert token in expected
                assert all(text.startswith(written + pieces[token]) for text in texts if text.startswith(written))
            token = chance.choice(sorted(found))
            if token in vocabulary().end_ids:
                break
            one.advance(token)
            written += pieces[token]


# -- random replies

_NAMES = st.sampled_from(["a", "b", "größe", "x y", 'q"t', "$ref"])
_SCALAR_SCHEMAS = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("string", "integer", "boolean", "null")]),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-9, 9),
        st.integers(0, 99),
    ),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.text(max_size=4) | st.integers(-9, 9), min_size=1, max_size=4)
    ),
    st.sampled_from(
        [{"type": "string", "pattern": "^[a-c]+x?$"}, {"type": "string", "format": "date"}, {"const": {"k": [1]}}]
    ),
)


def _compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(_NAMES, inner, max_size=3)
    objects = st.builds(
        lambda members, needed, more: {
            "type": "object",
            "properties": members,
            "required": [name for name in members if name in needed],
            **more,
        },
        properties,
        st.sets(_NAMES),
        st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}]),
    )
    arrays = st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    return objects | arrays | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))


SCHEMAS = st.recursive(_SCALAR_SCHEMAS, _compound, max_leaves=6)


def drawn(one: Guide, chance: random.Random, ends: Iterable[int], longest: int = 400) -> list[int] | None:
    """Draw a reply, ending it early more and more; None if it does not end."""
    ends, tokens = set(ends), []
    closing = [token for text in ('"', "}", "]", CALL_END, SECTION_END) for token in encoded(text)]
    for place in range(longest):
        choices = allowed(one)
        assert choices
        if choices & ends and chance.random() < 0.5:
            return tokens
        wanted = [token for token in closing if token in choices]
        if not choices - ends:
            return tokens
        hurry = wanted and chance.random() < place / 60
        token = chance.choice(wanted if hurry else sorted(choices - ends))
        one.advance(token)
        tokens.append(token)
    return None


@settings(max_examples=120)
@given(SCHEMAS, st.randoms(use_true_random=False))
def test_random_replies_fit_their_schema(schema: dict[str, Any], chance: random.Random) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    tokens = drawn(guide(Grammar.json_schema(schema)), chance, vocabulary().end_ids)
    assume(tokens is not None)
    value = json.loads(small_tokenizer().decode_bytes(tokens or []).decode("utf-8"))
    jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())


def _schema_of(value: Any) -> dict[str, Any]:
    """Give a schema that a value fits."""
    if isinstance(value, dict):
        members = {name: _schema_of(member) for name, member in value.items()}
        return {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}
    if isinstance(value, list):
        return {"type": "array", "items": {"anyOf": [_schema_of(item) for item in value] or [{}]}}
    return {"type": {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}[type(value)]}


_CHARACTERS = st.characters(codec="utf-8", exclude_characters="\x7f")  # DEL is written as an escape only
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(_CHARACTERS, max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(_CHARACTERS, max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(_VALUES, st.sampled_from([None, 1]))
def test_no_value_that_fits_is_forbidden(value: Any, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    one = guide(Grammar.json_schema(_schema_of(value)))
    for token in small_tokenizer().encode(text):
        assert token in allowed(one), text
        one.advance(token)
    assert allowed(one) & vocabulary().end_ids


@pytest.mark.parametrize("space", [" ", "\n", "\t"])
def test_white_space_does_not_go_on_for_ever(space: str) -> None:
    one, (token,) = advanced(guide(Grammar.json_object()), "{\n"), encoded(space)
    for _ in range(20):
        if token in allowed(one):
            one.advance(token)
    assert token not in allowed(one)
    advanced(one, '"a":')


# -- thinking


def test_thinking_is_free_and_the_content_bound() -> None:
    one = advanced(guide(Grammar.json_object(), thinking=True), 'I think, {"so": ] <think> I am. <|im_user|>')
    refused = [SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END, "[EOS]", "<|im_end|>"]
    special = small_tokenizer().special
    assert set(range(small_tokenizer().vocab_size)) - allowed(one) >= {special[name] for name in refused}
    assert small_tokenizer().vocab_size - len(allowed(one)) <= len(refused) + 1  # perhaps [EOT]
    advanced(one, '</think>{"a": [1]}')
    assert allowed(one) == vocabulary().end_ids


TWO = [
    tool("clock"),
    tool(
        "get",
        {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rom"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    ),
]


def called(name: str, arguments: str, number: int = 0) -> str:
    return f"{CALL_BEGIN}functions.{name}:{number}{ARGUMENT_BEGIN}{arguments}{CALL_END}"


OSLO = called("get", '{"city": "Oslo"}')


def test_auto_leaves_the_text_free_and_binds_each_section() -> None:
    one = guide(Grammar.tools(TWO), thinking=True)
    advanced(one, f"hm {{ </think>Let me look.{SECTION_BEGIN}{OSLO}{called('clock', '{}', 17)}{SECTION_END}")
    advanced(one, f" And {SECTION_BEGIN}{OSLO}{SECTION_END} done <think></think>")
    assert vocabulary().end_ids < allowed(one)


def test_a_call_may_begin_in_the_thinking_and_ends_it() -> None:
    one = advanced(guide(Grammar.tools(TWO), thinking=True), f"hm{SECTION_BEGIN}{OSLO}{SECTION_END}")
    assert encoded(SECTION_BEGIN)[0] in allowed(one)


def test_required_has_calls_and_nothing_else() -> None:
    one = guide(Grammar.tools(TWO, "required"), thinking=True)
    assert not allowed(one) & vocabulary().end_ids
    advanced(one, "hm</think>")
    assert allowed(one) == set(encoded(SECTION_BEGIN))
    advanced(one, f"{SECTION_BEGIN}{OSLO}{OSLO}{SECTION_END}")
    assert allowed(one) == vocabulary().end_ids


def test_a_named_tool_is_called_once() -> None:
    one = advanced(guide(Grammar.tools(TWO, "get")), SECTION_BEGIN + CALL_BEGIN)
    with pytest.raises(AssertionError):
        advanced(one, "functions.clock:0")
    one = advanced(guide(Grammar.tools(TWO, "get")), SECTION_BEGIN + OSLO)
    assert allowed(one) == set(encoded(SECTION_END))
    advanced(one, SECTION_END)
    assert allowed(one) == vocabulary().end_ids


def test_without_parallel_there_is_one_call_in_the_reply() -> None:
    one = advanced(guide(Grammar.tools(TWO, parallel=False)), f"text {SECTION_BEGIN}{OSLO}")
    assert allowed(one) == set(encoded(SECTION_END))
    advanced(one, f"{SECTION_END} more text")
    assert encoded(SECTION_BEGIN)[0] not in allowed(one)
    assert vocabulary().end_ids < allowed(one)


@pytest.mark.parametrize("before", ["", "hm</think>", "hm"])
def test_calls_may_come_in_place_of_the_content(before: str) -> None:
    grammar = Grammar.json_schema({"enum": ["a", 1]}).or_calls(TWO)
    end = vocabulary().end_ids
    one = advanced(guide(grammar, thinking=bool(before)), f"{before}{SECTION_BEGIN}{OSLO}{called('clock', '{}', 1)}")
    assert not allowed(one) & end
    advanced(one, SECTION_END)
    assert allowed(one) == end
    if before != "hm":
        one = advanced(guide(grammar, thinking=bool(before)), before)
        assert not allowed(one) & end
        assert encoded("[")[0] not in allowed(one)
        assert allowed(advanced(one, '"a"')) >= end
        assert encoded(SECTION_BEGIN)[0] not in allowed(one)


def test_calls_in_place_of_the_content_may_be_one_alone() -> None:
    grammar = Grammar.json_object().or_calls(TWO, parallel=False)
    one = advanced(guide(grammar), SECTION_BEGIN + OSLO)
    assert allowed(one) == set(encoded(SECTION_END))


def test_calls_in_place_of_the_content_need_tools() -> None:
    with pytest.raises(RequestError, match="tools: expected at least one function"):
        Grammar.json_object().or_calls([])


@pytest.mark.parametrize("marker", [SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END])
@pytest.mark.parametrize(
    "written", ["", "hm", "</think>", "</think>text", f"</think>{SECTION_BEGIN}{OSLO}{SECTION_END}"]
)
def test_no_marker_of_a_call_comes_outside_a_section(written: str, marker: str) -> None:
    assert encoded(marker)[0] not in allowed(advanced(guide(Grammar.tools(TWO), thinking=True), written))


@pytest.mark.parametrize(
    "wrong",
    [
        f"{CALL_BEGIN}functions.nobody:0",
        f"{CALL_BEGIN}functions.clock:00",
        f"{CALL_BEGIN}call_2",
        f'{CALL_BEGIN}functions.get:0{ARGUMENT_BEGIN}{{"city": "Bonn',
        f"{CALL_BEGIN}functions.get:0{ARGUMENT_BEGIN}{{}}",
        f"{CALL_BEGIN}functions.get:0{CALL_END}",
        f"{CALL_BEGIN}functions.clock:0{ARGUMENT_BEGIN}[]",
        f'{CALL_BEGIN}functions.clock:0{ARGUMENT_BEGIN}{{"a": "{CALL_END}',
        f"{OSLO} and {OSLO}",
        SECTION_END,
        "<|im_end|>",
    ],
)
def test_what_the_tools_do_not_allow_cannot_be_written(wrong: str) -> None:
    one = advanced(guide(Grammar.tools(TWO)), SECTION_BEGIN)
    with pytest.raises(AssertionError):
        advanced(one, wrong)


def test_look_alikes_in_ordinary_tokens_are_data() -> None:
    one = advanced(guide(Grammar.tools(TWO)), f'{SECTION_BEGIN}{CALL_BEGIN}functions.clock:0{ARGUMENT_BEGIN}{{"a": "')
    for token in small_tokenizer().encode(CALL_END):  # spelled out
        assert token in allowed(one)
        one.advance(token)
    advanced(one, f'"}}{CALL_END}{SECTION_END}')


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["exec", "get.it", "a-b", "größe", "x1", "$web_search"]), SCHEMAS, min_size=1, max_size=3
    ),
    st.sampled_from(["auto", "required"]),
    st.randoms(use_true_random=False),
)
def test_random_calls_are_read_back_as_declared(schemas: dict[str, Any], choice: str, chance: random.Random) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    bound = {
        name: {"type": "object", "properties": {"v": schema}, "required": ["v"]} for name, schema in schemas.items()
    }
    tools = [tool(name, schema, strict=True) for name, schema in bound.items()]
    one = advanced(guide(Grammar.tools(tools, choice)), SECTION_BEGIN)
    tokens = drawn(one, chance, vocabulary().end_ids if choice == "required" else encoded(SECTION_BEGIN))
    assume(tokens is not None)
    parser = OutputParser(small_tokenizer(), tools, thinking=False)
    events = parser.feed([*encoded(SECTION_BEGIN), *(tokens or [])]) + parser.finish()
    assert not parser.warnings
    begun = {event.index: event.name for event in events if event.kind == "tool_call_begin"}
    assert begun
    for index, name in begun.items():
        text = "".join(event.text for event in events if event.index == index)
        jsonschema.validate(json.loads(text), bound[name or ""], format_checker=jsonschema.FormatChecker())


def test_the_real_vocabulary(kimi_data: Any) -> None:
    tokenizer: Tokenizer | None = real_tokenizer()
    assert tokenizer is not None
    real = GuideVocabulary(tokenizer, [tokenizer.special["<|im_end|>"]])
    text = f"wo?</think>Ich schaue nach. {SECTION_BEGIN}{OSLO}{called('clock', '{}', 17)}{SECTION_END}"
    one = Guide(Grammar.tools(TWO), real, thinking=True)
    for token in tokenizer.encode(text, allow_special=True):
        assert one.allowed()[token], tokenizer.token_bytes(token)
        one.advance(token)
    one = Guide(
        Grammar.json_schema({"type": "object", "required": ["größe"], "properties": {"größe": {"type": "integer"}}}),
        real,
        False,
    )
    for token in tokenizer.encode('{\n  "größe": 17\n}'):
        assert one.allowed()[token]
        one.advance(token)
    assert one.allowed().sum() == len(real.end_ids)


def test_a_grammar_that_no_text_fits_is_refused_at_once() -> None:
    with pytest.raises(RequestError, match="schema: expected a grammar that some text fits, got: one that none fits"):
        guide(Grammar.json_schema({"$ref": "#"}))

"""What grammars are refused, and that none costs much, whatever a client sends."""

from __future__ import annotations

import builtins
import contextlib
import random
import time
from typing import Any

import pytest

from hybrid_k2.engine.grammar import MAX_DEPTH, MAX_MEMBERS, MAX_SCHEMA_CHARACTERS, Grammar
from hybrid_k2.errors import RequestError, shown
from tests.guides import CALL_BEGIN, SECTION_BEGIN, advanced, allowed, guide, tool
from tests.protocol_strategies import small_tokenizer

pytest.importorskip("llguidance", reason="llguidance is not installed")


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(count)}}


def endless() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


BAD_SCHEMAS: list[tuple[Any, str]] = [
    (7, "expected a JSON schema, got 7"),
    (None, "expected a JSON schema"),
    ([], "expected a JSON schema"),
    (False, "Unimplemented keys"),
    ({"type": "foo"}, "Invalid type: foo"),
    ({"type": 7}, "type must be a string"),
    ({"type": "string", "pattern": "(("}, "unclosed group"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"$ref": "#/$defs/x"}, "does not exist"),
    ({"$ref": "http://127.0.0.1:9/x.json"}, "does not fetch"),
    ({"$ref": "file:///etc/passwd"}, "does not fetch"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ({"enum": []}, "empty"),
    ({"not": {"type": "string"}}, "Unimplemented keys"),
    ({"type": "array", "uniqueItems": True}, "Unimplemented keys"),
    ({"type": "string", "format": "zork"}, "Unknown format"),
    ({"type": "object", "properties": 7}, "properties must be an object"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "unsatisfiable"),
    ({"minimum": 10**400}, "integers of at most 64 bits"),
    ({"minimum": float("nan")}, "expected JSON data"),
    ({"const": {1: 2}}, "keys that are text"),
    ({"const": {"a", "b"}}, "expected JSON data"),
    ({"const": b"bytes"}, "expected JSON data"),
    ({"const": "\ud800"}, "expected a JSON schema that can be enforced"),
    (nested(MAX_DEPTH + 1), f"at most {MAX_DEPTH} levels"),
    (endless(), f"at most {MAX_DEPTH} levels"),
    (properties(MAX_MEMBERS + 1), f"at most {MAX_MEMBERS} members"),
    ({"enum": ["x" * MAX_SCHEMA_CHARACTERS]}, f"at most {MAX_SCHEMA_CHARACTERS} characters"),
]


@pytest.mark.parametrize(("schema", "expected"), BAD_SCHEMAS, ids=[shown(schema)[:60] for schema, _ in BAD_SCHEMAS])
def test_bad_schemas_are_errors_of_the_request(schema: Any, expected: str) -> None:
    with pytest.raises(RequestError, match=r"^schema\S*: expected ") as error:
        Grammar.json_schema(schema)
    assert expected in error.value.message
    assert len(error.value.message) < 700
    assert "%json" not in error.value.message


@pytest.mark.parametrize(
    "schema",
    [True, {}, {"type": "object"}, nested(40), properties(MAX_MEMBERS), {"enum": [f"value {n}" for n in range(8000)]}],
    ids=lambda schema: shown(schema)[:60],
)
def test_large_and_open_schemas_are_taken(schema: Any) -> None:
    assert Grammar.json_schema(schema).binds == "content"


@pytest.mark.parametrize("before", ["", "x", "xx"])
def test_what_makes_the_library_panic_is_the_error_of_one_request(before: str) -> None:
    """A panic is no `Exception`: it would end the thread that serves all others."""
    wrong = {"minimum": before + "é" * 200}  # llguidance 1.9.1 cuts it in the middle of a character
    with pytest.raises(RequestError, match="schema: expected"):
        Grammar.json_schema(wrong)
    source = Grammar.tools([tool("a", wrong)]).source  # is left to the model
    assert "é" not in source


@pytest.mark.parametrize("step", ["compute_bitmask", "consume_token"])
def test_a_panic_in_a_reply_is_the_error_of_one_request(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    class PanicException(BaseException):
        pass

    class Matcher:
        def __getattr__(self, name: str) -> Any:
            if name == step:
                raise PanicException("index out of bounds")
            return getattr(matcher, name)

    one = guide(Grammar.json_object())
    matcher = one._matcher
    monkeypatch.setattr(one, "_matcher", Matcher())
    with pytest.raises(RequestError, match="grammar: expected what llguidance can read"):
        advanced(one, "{")


def test_the_most_properties_that_an_object_may_have_can_be_followed() -> None:
    one, chance = guide(Grammar.json_schema(properties(MAX_MEMBERS))), random.Random()
    for name in ("p0", f"p{MAX_MEMBERS - 1}"):
        advanced(one, f'{"{" if name == "p0" else ","}"{name}":"')
        for _ in range(20):
            token = chance.choice(sorted(allowed(one) & set(range(ord("a"), ord("z")))))
            one.advance(token)
        advanced(one, '"')
    advanced(one, "}")


def test_a_schema_cannot_change_the_rules_of_its_enforcement() -> None:
    options = {"lenient": True, "whitespace_flexible": False}
    with pytest.raises(RequestError, match="Unimplemented keys"):
        Grammar.json_schema({"not": {}, "x-guidance": options})


HOSTILE = [
    {"type": "string", "pattern": "(a{1,5000}){1,5000}"},
    {"type": "string", "pattern": "(a|b|ab){1,3000}c"},
    {"type": "string", "pattern": "(a?){5000}a{5000}"},
    {"type": "string", "pattern": "(x+x+)+y"},
    {"type": "string", "maxLength": 10**9},
    {"type": "array", "items": {"type": "array", "minItems": 3000}, "minItems": 3000},
    {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for i in range(10)]} for j in range(12)]},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"anyOf": [properties(200) for _ in range(20)]},
]


@pytest.mark.parametrize("schema", HOSTILE, ids=lambda schema: shown(schema)[:60])
def test_hostile_schemas_cost_little_processor_time(schema: dict[str, Any]) -> None:
    """Compiling and 100 masks: a millisecond or two for most, where a bomb without bounds takes minutes."""
    start, chance = time.process_time(), random.Random()
    with contextlib.suppress(RequestError):
        one = guide(Grammar.json_schema(schema))
        for _ in range(100):
            one.advance(chance.choice(sorted(allowed(one))))
    assert time.process_time() - start < 10


# -- tools

BAD_TOOLS: list[tuple[Any, str, str]] = [
    ([], "auto", "tools: expected at least one function, got none"),
    (None, "required", "tools: expected at least one function, got none"),
    ([{"type": "_plugin"}], "auto", "tools: expected at least one function, got none"),
    ([tool("a")], "b", "tool_choice: expected auto, required or a declared tool, got 'b'"),
    ([tool("a", {"not": {}}, strict=True)], "auto", "tools[0].function.parameters: expected a JSON schema that can"),
    ([tool("a"), tool("b", 7, strict=True)], "auto", "tools[1].function.parameters: expected a JSON schema, got 7"),
    ([tool("a", {"type": "string"}, strict=True)], "auto", 'tools[0].function.parameters.type: expected "object"'),
    ([{"type": "builtin_function", "function": {"name": "$code"}}], "auto", "tools[0].function.name: expected one of"),
]


@pytest.mark.parametrize(("tools", "choice", "expected"), BAD_TOOLS)
def test_bad_tools_are_errors_of_the_request(tools: Any, choice: str, expected: str) -> None:
    with pytest.raises(RequestError) as error:
        Grammar.tools(tools, choice)
    assert error.value.message.startswith(expected)


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "not": {}}, '"a"'),  # the rest is enforced
        ({"properties": {"a": {"uniqueItems": True}}}, '"a"'),
        ({"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}, '"a"'),
        ({"type": "foo"}, ""),
        ({"type": "array"}, ""),
        (properties(MAX_MEMBERS + 1), ""),
        (nested(MAX_DEPTH + 1), ""),
        ("no schema", ""),
        (None, ""),
    ],
    ids=lambda parameters: shown(parameters)[:60],
)
def test_a_tool_that_is_not_strict_is_never_refused_for_its_schema(parameters: Any, kept: str) -> None:
    lines = Grammar.tools([tool("a", parameters), tool("b")]).source.splitlines()
    (bound,) = (line for line in lines if line.startswith("arguments_0: "))
    assert '"type": "object"' in bound
    assert kept in bound


def test_a_builtin_tool_is_bound_as_the_function_that_it_stands_for() -> None:
    source = Grammar.tools([{"type": "builtin_function", "function": {"name": "$web_search"}}]).source
    assert '"functions.$web_search:"' in source
    assert '"query"' in source


def test_properties_come_in_the_order_in_which_the_model_reads_them() -> None:
    members = {name: {"type": "string"} for name in ("z", "a", "m", "b")}
    schema = {"type": "object", "properties": {"in": {"properties": members, "required": ["z"]}}}
    source = Grammar.tools([tool("f", schema)]).source
    assert source.index('"z": {') < source.index('"a": {') < source.index('"b": {') < source.index('"m": {')


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "%json", "größe", "a:1", "x" * 3000, "<|tool_call_end|>"])
def test_a_name_is_a_string_of_the_grammar_whatever_it_looks_like(name: str) -> None:
    one = advanced(guide(Grammar.tools([tool(name)], "required")), SECTION_BEGIN + CALL_BEGIN)
    for token in small_tokenizer().encode(f"functions.{name}:0"):
        assert token in allowed(one)
        one.advance(token)


def test_many_tools_and_their_bound() -> None:
    assert Grammar.tools([tool(f"tool_{number}", properties(10)) for number in range(128)]).binds == "calls"
    with pytest.raises(RequestError, match="tools: expected schemas of at most"):
        Grammar.tools([tool(f"tool_{number}", {"description": "x" * 20_000}) for number in range(128)])


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for make in (Grammar.json_object, lambda: Grammar.tools([tool("a")])):
        with pytest.raises(RequestError, match="expected the package llguidance") as error:
            make()
        assert error.value.hint == "pip install llguidance"

"""Tool declarations: the TypeScript dialect of K2.6, and JSON where it has no word for a schema."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from hybrid_k2.errors import RequestError
from hybrid_k2.protocol import declare_tools
from tests.protocol_strategies import tool_lists


def declare(properties: dict[str, Any], name: str = "f", **parameters: Any) -> str:
    """Declare one function and return what stands inside the namespace."""
    schema = {"type": "object", "properties": properties, **parameters}
    text = declare_tools([{"type": "function", "function": {"name": name, "parameters": schema}}])
    before, after = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(before), text
    assert text.endswith(after)
    return text[len(before) : -len(after)]


def type_of(schema: Any) -> str:
    text = declare({"x": schema})
    return text[text.index("x?: ") + 4 : -len("\n}) => any;")]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, "string"),
        ({"type": "integer"}, "number"),
        ({"type": "null"}, "null"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"type": ["integer", "object", "array", "boolean"]}, "number | {} | Array<any> | boolean"),
        ({"enum": [1, None, True, "s"]}, '1 | None | True | "s"'),
        ({"enum": ["a", None], "type": ["string", "null"]}, '"a" | None'),
        ({"type": "object"}, "{}"),
        ({"type": "object", "properties": {}}, "{}"),
        ({"type": "object", "additionalProperties": True}, "{\n    [k: string]: any\n  }"),
        ({"type": "object", "additionalProperties": False}, "{\n    [k: string]: never\n  }"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "{\n    [k: string]: number\n  }"),
        ({"type": "object", "additionalProperties": None}, "{}"),
        ({"type": "array"}, "Array<any>"),
        ({"type": "array", "items": {"type": "integer"}}, "Array<number>"),
        (
            {"type": "array", "items": {"type": "string", "description": "one\ntwo", "maxLength": 3}},
            "Array<\n    // one\n    // two\n    // maxLength: 3\n    string\n  >",
        ),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string | null"),
        (
            {"anyOf": [{"type": "object", "properties": {"a": {"type": "string"}}}, {"type": "null"}]},
            "{\n    a?: string\n  } | null",
        ),
        ({}, "any"),
        (True, "any"),
        (False, "null"),
    ],
)
def test_types(schema: Any, expected: str) -> None:
    assert type_of(schema) == expected


@pytest.mark.parametrize(
    ("schema", "comments"),
    [
        ({"type": "boolean", "default": False}, "  // Default: False\n"),
        ({"type": "integer", "default": 0}, "  // Default: 0\n"),
        ({"type": "string", "default": "é"}, '  // Default: "é"\n'),
        ({"type": "string", "default": None}, ""),
        ({"type": "array", "default": [1, "a"]}, '  // Default: [1, "a"]\n'),
        ({"type": "string", "description": "one\n\ntwo"}, "  // one\n\n  // two\n"),
        ({"type": "string", "pattern": "^a$", "minLength": 1, "minimum": 2}, "  // minLength: 1, pattern: ^a$\n"),
        ({"type": "number", "minimum": 0, "maximum": 2.5, "maxLength": 1}, "  // maximum: 2.5, minimum: 0\n"),
        ({"type": "array", "minItems": 1, "maxItems": 2}, "  // maxItems: 2, minItems: 1\n"),
        ({"enum": [1], "type": "integer", "minimum": 1}, ""),
    ],
)
def test_comments(schema: dict[str, Any], comments: str) -> None:
    text = declare({"x": schema})
    assert text.startswith(f"type f = (_: {{\n{comments}  x?: ")


def test_required_come_first_and_each_group_is_sorted() -> None:
    properties = {name: {"type": "string"} for name in ("d", "b", "c", "a")}
    assert declare(properties, required=["d", "b", "unknown"], additionalProperties=False) == (
        "type f = (_: {\n  b: string,\n  d: string,\n  a?: string,\n  c?: string,\n  [k: string]: never\n}) => any;"
    )


def test_nested_required_object() -> None:
    user = {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "name": {"type": "string"}},
        "required": ["name"],
    }
    assert declare({"user": user}, name="create_user", required=["user"]) == (
        "type create_user = (_: {\n  user: {\n    name: string,\n    age?: number\n  }\n}) => any;"
    )


def test_definitions_become_interfaces() -> None:
    point = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "description": "A point."}
    text = declare({"at": {"$ref": "#/$defs/Point", "description": "where"}}, **{"$defs": {"Point": point}})
    assert text == (
        "// A point.\ninterface Point {\n  x: number\n}\ntype f = (_: {\n  // where\n  at?: Point\n}) => any;"
    )


def test_a_reference_to_the_root_names_it() -> None:
    text = declare({"next": {"$ref": "#"}, "id": {"type": "integer"}}, required=["next"])
    assert text == "interface parameters {\n  id?: number,\n  next: parameters\n}\ntype f = (_: parameters) => any;"


def test_functions_without_parameters_and_other_kinds_of_tools() -> None:
    tools = [
        {"type": "function", "function": {"name": "now", "description": "What time is it?"}},
        {"type": "_plugin", "id": "x"},
        {"type": "function", "function": {"name": "a.b-c", "parameters": {}}},
    ]
    assert declare_tools(tools) == (
        "# Tools\n\n## functions\nnamespace functions {\n// What time is it?\ntype now = (_: {}) => any;\n"
        "type a.b-c = (_: {}) => any;\n}\n"
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "string"}]},
        {"description": "no type"},
        {"type": ["string", "file"]},
        {"type": 5},
        {"enum": ["a"], "type": "integer"},
        {"enum": [1.5], "type": "integer"},
        {"enum": ["a"], "type": ["string", "integer"]},
        {"$ref": "#/$defs/Unknown"},
        {"$ref": "http://example.com/schema"},
        {"type": "object", "properties": None},
        {"type": "object", "properties": {}, "required": "x"},
        {"type": "string", "description": 5},
        {"type": "array", "items": [{"type": "string"}]},
        "string",
        None,
    ],
)
def test_other_schemas_send_the_whole_list_as_json(schema: Any) -> None:
    good = {"type": "function", "function": {"name": "good"}}
    bad = {
        "type": "function",
        "function": {"name": "bäd", "parameters": {"type": "object", "properties": {"x": schema}}},
    }
    text = declare_tools([good, bad])
    assert text == json.dumps([good, bad], sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def test_no_functions_send_the_list_as_json() -> None:
    assert declare_tools([{"type": "_plugin", "a": 1}]) == '[{"a":1,"type":"_plugin"}]'


@pytest.mark.parametrize(
    ("tools", "place"),
    [
        ("x", "tools: expected a list, got str"),
        ({}, "tools: expected a list, got dict"),
        ([1], r"tools\[0\]: expected an object, got int"),
        ([{"type": "function"}], r"tools\[0\]\.function: expected an object, got NoneType"),
        ([{"type": "function", "function": {}}], r"tools\[0\]\.function\.name: expected the function's name, got None"),
        ([{"type": "function", "function": {"name": ""}}], r"tools\[0\]\.function\.name: "),
        ([{"type": "x", 1: 2}], r"tools\[0\]: expected keys that are text"),
        ([{"type": "function", "function": {"name": 10**6000}}], r"tools\[0\]\.function\.name: "),
        ([{"type": "x", "y": {1, 2}}], r"tools\[0\]: expected JSON data, got {1, 2}"),
        ([{"type": "x", "y": b"bytes"}], r"tools\[0\]: expected JSON data, got b'bytes'"),
        ([{"type": "x", 10**6000: 2}], r"tools\[0\]: expected keys that are text"),
    ],
)
def test_malformed_tools(tools: Any, place: str) -> None:
    with pytest.raises(RequestError, match=place):
        declare_tools(tools)


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [1, -(10**6000)]},
        {"type": "integer", "default": 10**6000},
        {"type": "integer", "maximum": 10**6000},
        {"oneOf": [10**6000]},
        {"type": "string", "default": {1, 2}},
        {"enum": [b"bytes"]},
    ],
    ids=["enum", "default", "maximum", "no TypeScript", "a set", "bytes"],
)
def test_data_that_is_no_json_is_refused_wherever_it_stands(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^tools\[0\]: expected ") as caught:
        type_of(schema)
    assert len(caught.value.message) < 200


def test_large_integers_are_declared() -> None:
    assert type_of({"enum": [10**300, -1]}) == f"{10**300} | -1"


def test_deep_schemas_are_declared_or_refused_and_never_overflow() -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        return schema

    assert type_of(nested(80)) == "Array<" * 80 + "string" + ">" * 80
    with pytest.raises(RequestError, match="levels of nesting"):
        type_of(nested(100_000))


@settings(suppress_health_check=list(HealthCheck))
@given(tool_lists())
def test_the_order_of_keys_makes_no_difference(tools: list[dict[str, Any]]) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(value)}
        return [turned(item) for item in value] if isinstance(value, list) else value

    assert declare_tools(turned(tools)) == declare_tools(tools)

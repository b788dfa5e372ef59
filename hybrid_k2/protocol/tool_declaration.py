"""Tools as the model reads them: TypeScript declarations, made from JSON schemas.

A schema that this TypeScript cannot say sends the whole list to the model as compact JSON instead; the model
was trained on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_k2.errors import RequestError, shown
from hybrid_k2.protocol.messages import dump_json
from hybrid_k2.protocol.typescript import SchemaError, declare_function

MAX_DEPTH = 100  # far beyond any real schema, and well inside the recursion limit of Python
MAX_BITS = 4096  # of an integer; Python refuses to write one of more than 4300 digits


def declare_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Declare the tools; the order of keys in the request makes no difference.

    Raises: RequestError when an entry is no tool, or a schema is nested too deeply.
    """
    checked = _check_tools(tools)
    try:
        declaration = _declare_typescript(checked)
    except SchemaError:
        declaration = ""
    return declaration or dump_json(checked, "tools", separators=(",", ":"))


def _declare_typescript(tools: Sequence[Mapping[str, Any]]) -> str:
    functions = [declare_function(tool["function"]) for tool in tools if tool.get("type") == "function"]
    if not functions:
        return ""
    return "# Tools\n\n## functions\nnamespace functions {\n" + "\n".join(functions) + "\n}\n"


def _check_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise RequestError(f"tools: expected a list, got {type(tools).__name__}")
    checked: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            raise RequestError(f"{place}: expected an object, got {type(tool).__name__}")
        if tool.get("type") == "function":
            _check_function(tool.get("function"), f"{place}.function")
        checked.append(_sort_keys(tool, place, 0))
    return checked


def _check_function(function: object, place: str) -> None:
    if not isinstance(function, Mapping):
        raise RequestError(f"{place}: expected an object, got {type(function).__name__}")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{place}.name: expected the function's name, got {shown(name)}")


def _sort_keys(value: Any, place: str, depth: int) -> Any:
    """Copy JSON data with every object's keys in order; lists keep theirs. Raises: RequestError for other data."""
    if depth > MAX_DEPTH:
        raise RequestError(f"{place}: expected at most {MAX_DEPTH} levels of nesting, got more")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RequestError(f"{place}: expected keys that are text, got {sorted(map(shown, value))}")
        return {key: _sort_keys(value[key], place, depth + 1) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_sort_keys(item, place, depth + 1) for item in value]
    if value is not None and not isinstance(value, (str, int, float)):
        raise RequestError(f"{place}: expected JSON data, got {shown(value)}")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise RequestError(f"{place}: expected integers of at most {MAX_BITS} bits, got one of {value.bit_length()}")
    return value

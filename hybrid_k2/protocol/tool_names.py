"""Which declared tool a call means: the model's ids come in more forms than `functions.NAME:N`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_ID_CHARS = 256

_COUNTER = re.compile(r":\d*$")
_NAMESPACE = re.compile(r"^functions[._:/-]?")
_NAME = re.compile(r"[\w.\-/]+")
_NAMELESS = re.compile(r"(call)?[._:-]?\d*")


class ToolNames:
    """The names and argument names of the declared tools."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._schemas = dict(_declared(tools or ()))

    def resolve(self, call_id: str) -> str | None:
        """Return the tool that an id names; None if none.

        With tools declared: the exact name, with or without `functions.` and `:N`; then the name that is left when
        `functions` and trailing digits are taken off with their separators, as little as possible.
        With none declared: the name in `functions.NAME`, `NAME:N` or `functions.NAME:N`.
        """
        compact = "".join(call_id.split())
        base = _COUNTER.sub("", compact)
        if not self._schemas:
            name = base.removeprefix("functions.")
            return name if name != compact and _NAME.fullmatch(name) else None
        return next((name for name in _spellings(base) if name in self._schemas), None)

    def is_nameless(self, call_id: str) -> bool:
        """Say whether an id holds nothing but a counter, so that only the arguments can tell the tool."""
        base = _NAMESPACE.sub("", _COUNTER.sub("", "".join(call_id.split())))
        return bool(self._schemas) and _NAMELESS.fullmatch(base) is not None

    def match_arguments(self, arguments: str) -> str | None:
        """Return the one tool whose schema has all the arguments' names, and asks for no others; None if not one."""
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        fitting = [name for name, (known, required) in self._schemas.items() if required <= value.keys() <= known]
        return fitting[0] if len(fitting) == 1 else None


def _declared(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, tuple[frozenset[str], frozenset[str]]]]:
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            schema = parameters if isinstance(parameters, Mapping) else {}
            yield function["name"], (_names(schema.get("properties")), _names(schema.get("required")))


def _names(value: object) -> frozenset[str]:
    return (
        frozenset(name for name in value if isinstance(name, str))
        if isinstance(value, (Mapping, list))
        else frozenset()
    )


def _spellings(base: str) -> Iterator[str]:
    """Yield the names that an id may stand for, those closest to it first."""
    fronts = dict.fromkeys((base, _NAMESPACE.sub("", base)))
    yield from fronts
    for front in fronts:
        name = front
        while name and name[-1].isdecimal():
            name = name[:-1]
            yield name
        yield name.rstrip("._:-")

"""Tools that the hosted Kimi API knows by name: `{"type": "builtin_function", "function": {"name": "$web_search"}}`.

The model sees such a tool as an ordinary function. It is the client that runs it, as for every other call: this program
never reaches out to the web. A client of the hosted API that only sends the arguments back as the result keeps working;
the model then answers without results of a search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_k2.errors import RequestError, shown

BUILTIN_TYPE = "builtin_function"
_QUERY = {"type": "string", "description": "What to search for"}
_BUILTIN: Mapping[str, Mapping[str, Any]] = {
    "$web_search": {
        "name": "$web_search",
        "description": "Search the web",
        "parameters": {"type": "object", "properties": {"query": _QUERY}, "required": ["query"]},
    },
}


def call_type(name: str) -> str:
    """Return what the `type` of a call of this tool is."""
    return BUILTIN_TYPE if name in _BUILTIN else "function"


def expand_builtins(tools: Sequence[Mapping[str, Any]] | None, thinking: bool) -> Sequence[Mapping[str, Any]] | None:
    """Replace builtin tools by the functions that they stand for; what else is malformed stays as it is.

    Raises: RequestError for a builtin that there is not, or one in a request that thinks, as the hosted API does.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        return tools
    return [_expanded(tool, f"tools[{index}]", thinking) for index, tool in enumerate(tools)]


def _expanded(tool: Mapping[str, Any], place: str, thinking: bool) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != BUILTIN_TYPE:
        return tool
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in _BUILTIN:
        raise RequestError(f"{place}.function.name: expected one of {', '.join(_BUILTIN)}, got {shown(name)}")
    if thinking:
        raise RequestError(
            f"{place}: expected thinking to be off with {name}, got it on", hint="switch thinking off for this request"
        )
    return {"type": "function", "function": _BUILTIN[name]}

"""The many ways in which clients switch thinking on and off."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hybrid_k2.errors import shown
from hybrid_k2.server.body import check_fields
from hybrid_k2.server.errors import bad_request

# K2.6 thinks or does not: every effort but none lets it think, as much as it wants.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_TEMPLATE_FLAGS = ("thinking", "enable_thinking", "preserve_thinking")


class Thinking(NamedTuple):
    """Whether the model thinks, and whether it sees the reasoning of all earlier turns."""

    on: bool
    keep: bool


def read_thinking(
    thinking: Any = None,
    reasoning_effort: Any = None,
    enable_thinking: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Thinking:
    """Read `thinking`, `reasoning_effort`, `enable_thinking` and `chat_template_kwargs`.

    Raises: ApiError for a wrong value, and for two switches that disagree.
    """
    if thinking is not None and reasoning_effort is not None:
        raise bad_request("reasoning_effort", "cannot specify both 'thinking' and 'reasoning_effort'")
    keep = _flag(template_kwargs, "preserve_thinking") or False
    switches: list[tuple[str, bool]] = [*_template_switches(template_kwargs)]
    if enable_thinking is not None:
        switches.append(("enable_thinking", enable_thinking))
    if reasoning_effort is not None:
        switches.append(("reasoning_effort", _thinks_with(reasoning_effort)))
    if thinking is not None:
        on, keep_all = read_thinking_object(thinking)
        switches.append(("thinking", on))
        keep = keep or keep_all
    for (first, wanted), (second, other) in itertools.pairwise(switches):
        if wanted != other:
            raise bad_request(second, f"expected it to agree with {first}, got thinking both on and off")
    return Thinking(switches[0][1] if switches else True, keep)


def read_thinking_object(thinking: Any) -> Thinking:
    """Read `{"type": "enabled" | "disabled", "keep": null | "all"}`. Raises: ApiError."""
    if not isinstance(thinking, Mapping):
        raise bad_request("thinking", f'expected an object like {{"type": "enabled"}}, got {shown(thinking)}')
    check_fields(thinking, ("type", "keep"), "thinking", "it; it has type and keep")
    if thinking.get("type") not in ("enabled", "disabled"):
        raise bad_request("thinking.type", f"expected enabled or disabled, got {shown(thinking.get('type'))}")
    if thinking.get("keep") not in (None, "all"):
        raise bad_request("thinking.keep", f"expected null or all, got {shown(thinking['keep'])}")
    return Thinking(thinking["type"] == "enabled", thinking.get("keep") == "all")


def _thinks_with(effort: Any) -> bool:
    if effort not in EFFORTS:
        raise bad_request("reasoning_effort", f"expected one of {', '.join(EFFORTS)}, got {shown(effort)}")
    return bool(effort != "none")


def _template_switches(kwargs: Mapping[str, Any] | None) -> Iterator[tuple[str, bool]]:
    for name in kwargs or {}:
        if name not in _TEMPLATE_FLAGS:
            raise bad_request(f"chat_template_kwargs.{name}", f"expected one of {', '.join(_TEMPLATE_FLAGS)}")
        value = _flag(kwargs, name)
        if value is not None and name != "preserve_thinking":
            yield f"chat_template_kwargs.{name}", value


def _flag(kwargs: Mapping[str, Any] | None, name: str) -> bool | None:
    value = (kwargs or {}).get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"chat_template_kwargs.{name}", f"expected true or false, got {shown(value)}")
    return value

"""`--strict-moonshot`: what Moonshot's own API refuses for K2.6, with its words.

Without the flag these requests are answered; tests of vendors expect them to be refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hybrid_k2.server.chat import Chat
from hybrid_k2.server.errors import ApiError, bad_request
from hybrid_k2.server.sampling import SamplingFields

_TOP_P = 0.95
_TEMPERATURE = {True: 1.0, False: 0.6}  # thinking or not
_MAX_STOPS, _MAX_STOP_BYTES = 5, 32
_TOOL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_-]{2,63}")


def check(chat: Chat) -> None:
    """Refuse what the official API refuses. Raises: ApiError."""
    thinks = chat.thinking.on
    _check_sampling(chat.sampling, thinks)
    _check_stop(chat.sampling.stop)
    if thinks and chat.tool_choice not in ("auto", "none"):
        choice = "required" if chat.tool_choice == "required" else "specified"
        raise _refusal("tool_choice", f"tool_choice '{choice}' is incompatible with thinking enabled")
    for tool in chat.tools:
        name = tool["function"]["name"]
        if tool["type"] == "function" and not _TOOL_NAME.fullmatch(name):
            raise _refusal("tools", f"function name is invalid, must match {_TOOL_NAME.pattern}: {name}")
    for index, message in enumerate(chat.messages):
        _check_message(index, message, thinks)


def _check_sampling(sampling: SamplingFields, thinks: bool) -> None:
    fixed = {
        "temperature": _TEMPERATURE[thinks],
        "top_p": _TOP_P,
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }
    for name, only in fixed.items():
        if getattr(sampling, name) not in (None, only):
            raise _refusal(name, f"invalid {name}: only {only:g} is allowed for this model")


def _check_stop(stop: Any) -> None:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > _MAX_STOPS:
        raise bad_request("stop", f"expected at most {_MAX_STOPS} strings, got {len(stops)}")
    for one in stops:
        if isinstance(one, str) and len(one.encode("utf-8", "replace")) > _MAX_STOP_BYTES:
            raise bad_request("stop", f"expected strings of at most {_MAX_STOP_BYTES} bytes")


def _check_message(index: int, message: Mapping[str, Any], thinks: bool) -> None:
    content = message.get("content")
    if isinstance(content, list) and any(part.get("type") == "text" and part.get("text") == "" for part in content):
        raise _refusal("messages", "text content is empty")
    if thinks and message.get("tool_calls") and "reasoning_content" not in message:
        raise _refusal(
            "messages",
            f"thinking is enabled but reasoning_content is missing in assistant tool call message at index {index}",
        )


def _refusal(param: str, text: str) -> ApiError:
    """Return an error in the words of the official API, which do not begin with the parameter."""
    return ApiError(400, text, param=param)

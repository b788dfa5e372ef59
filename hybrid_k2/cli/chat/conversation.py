"""A conversation: what was said, and the JSON file it is saved in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_k2.cli.chat.files import read_json, write_whole
from hybrid_k2.cli.chat.media import is_content
from hybrid_k2.errors import ConfigError, RequestError

FORMAT = "hybrid-k2 conversation 1"
MAX_BYTES = 256 * 2**20  # of its file: K2.6's whole context is some 2 MB of text, the rest is for images
Message = dict[str, Any]
_FIELDS: dict[str, dict[str, type]] = {
    "user": {"content": str},
    "assistant": {"content": str, "reasoning_content": str, "tool_calls": list, "stopped": bool},
    "tool": {"content": str, "tool_call_id": str},
}
_NEEDED = {"user": {"content"}, "assistant": {"content"}, "tool": {"content", "tool_call_id"}}


@dataclass
class Conversation:
    """The system prompt and the messages in order; a reply that was cut short has `"stopped": true`."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def prompt(self) -> list[Message]:
        """Return the messages as the model gets them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{k: v for k, v in message.items() if k != "stopped"} for message in self.messages]

    def before_last_reply(self) -> list[Message]:
        """Return the messages up to the last one of the user or of a tool.

        Raises: RequestError: there is none.
        """
        ends = [i + 1 for i, message in enumerate(self.messages) if message["role"] != "assistant"]
        if not ends:
            raise RequestError("/regen: expected a message to answer, got an empty conversation")
        return self.messages[: ends[-1]]

    def open_tool_calls(self) -> list[Message]:
        """Return the tool calls of the last message that have no result yet."""
        last = self.messages[-1] if self.messages else {}
        return [] if last.get("stopped") else list(last.get("tool_calls") or ())


def save_conversation(path: Path, conversation: Conversation, *, model: str, thinking: bool) -> None:
    """Write a conversation to a file that only the user can read.

    Effects: the file appears whole or not at all; one that was there is replaced.
    Raises: ConfigError: the file cannot be written, or would be too large to be loaded again.
    """
    data = {
        "format": FORMAT,
        "model": model,
        "thinking": thinking,
        "system": conversation.system,
        "messages": conversation.messages,
    }
    text = json.dumps(data, ensure_ascii=False, indent=2) + "\n"
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise ConfigError(
            f"{path}: expected a conversation of at most {MAX_BYTES // 2**20} MiB with its images and videos, got more"
        )
    write_whole(path, text)


def load_conversation(path: Path) -> tuple[Conversation, bool]:
    """Read a saved conversation, and whether thinking was on.

    Raises: ConfigError: the file is missing, unreadable or not such a file; the message names the place in it.
    """
    data = read_json(path, MAX_BYTES)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f'{path}: expected a conversation saved by /save ("format": "{FORMAT}")')
    system, thinking, messages = data.get("system"), data.get("thinking"), data.get("messages")
    _require(path, "system", system is None or isinstance(system, str), "a string or null", system)
    _require(path, "thinking", isinstance(thinking, bool), "true or false", thinking)
    if not isinstance(messages, list):
        raise ConfigError(f"{path}: messages: expected a list, got {_shown(messages)}")
    for index, message in enumerate(messages):
        _check_message(path, f"messages[{index}]", message)
    return Conversation(system, messages), bool(thinking)


def _check_message(path: Path, place: str, message: Any) -> None:
    _require(path, place, isinstance(message, dict), "an object", message)
    role = message.get("role")
    _require(path, f"{place}.role", isinstance(role, str) and role in _FIELDS, "user, assistant or tool", role)
    for name in _NEEDED[role] - message.keys():
        raise ConfigError(f"{path}: {place}.{name}: missing")
    for name, value in message.items():
        if name == "role":
            continue
        _require(path, f"{place}.{name}", name in _FIELDS[role], f"no such field in a message of role {role}", value)
        if (role, name) == ("user", "content"):
            _require(path, f"{place}.{name}", is_content(value), "a str, or a list of texts, images and videos", value)
            continue
        kind = _FIELDS[role][name]
        _require(path, f"{place}.{name}", isinstance(value, kind), f"a {kind.__name__}", value)
    for index, call in enumerate(message.get("tool_calls") or ()):
        _check_call(path, f"{place}.tool_calls[{index}]", call)


def _check_call(path: Path, place: str, call: Any) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    named = isinstance(function, dict) and all(isinstance(function.get(key), str) for key in ("name", "arguments"))
    _require(path, place, named and isinstance(call.get("id"), str), "id and function {name, arguments}", call)


def _require(path: Path, place: str, right: bool, expected: str, value: Any) -> None:
    if not right:
        raise ConfigError(f"{path}: {place}: expected {expected}, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"

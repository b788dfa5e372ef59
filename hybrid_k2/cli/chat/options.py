"""What the options of `chat` say, checked before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_k2.cli.chat.files import read_json
from hybrid_k2.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from hybrid_k2.engine import SamplingParams


@dataclass(frozen=True)
class ChatOptions:
    """How replies are asked for."""

    params: SamplingParams
    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    thinking: bool = True


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Read a list of tool declarations in the form of the OpenAI API.

    Raises: ConfigError: no such file, not JSON, or not of that form.
    """
    tools = read_json(path)
    if not isinstance(tools, list) or not tools:
        raise ConfigError(f"{path}: expected a JSON list of tool declarations, got {_kind(tools)}")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConfigError(
                f'{path}: [{index}]: expected {{"type": "function", "function": {{"name": …, "parameters": …}}}}, '
                f"got {json.dumps(tool, ensure_ascii=False)[:80]}"
            )
    from hybrid_k2.protocol import declare_tools

    try:
        declare_tools(tools)
    except RequestError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error
    return tools


def check_text(text: str, subject: str) -> str:
    """Return a text that can be encoded and is not blank.

    Raises: RequestError.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # Python keeps bytes of the command line that are no UTF-8 as lone surrogates.
        raise RequestError(f"{subject}: expected UTF-8 text, got {text[error.start]!r}") from error
    if not text.strip():
        raise RequestError(f"{subject}: expected text, got none")
    return text


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "an empty list"
    return {dict: "an object", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)

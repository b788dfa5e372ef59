"""The body of Anthropic's Messages API, and what it becomes: the messages, tools and parameters of a chat.

Texts and images stay what they are; a `thinking` block of an earlier turn becomes that turn's reasoning; `tool_use`
becomes a call, and each `tool_result` a message of its own before the user's text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import WithJsonSchema

from hybrid_k2.engine.params import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from hybrid_k2.errors import shown
from hybrid_k2.server.body import AnyObject, Body, check_fields, text_field
from hybrid_k2.server.errors import bad_request
from hybrid_k2.server.images import FILE_SCHEME, IMAGE_TYPES, image_part
from hybrid_k2.server.sampling import SamplingFields
from hybrid_k2.server.thinking import Thinking

SystemText = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})
]
_TOOL_FIELDS = frozenset(
    {"type", "name", "description", "input_schema", "cache_control", "strict", "eager_input_streaming"}
)
_BLOCK_FIELDS = {
    "text": {"text", "citations"},
    "image": {"source"},
    "thinking": {"thinking", "signature"},
    "redacted_thinking": {"data"},
    "tool_use": {"id", "name", "input", "caller"},
    "tool_result": {"tool_use_id", "content", "is_error"},
}
_SOURCE_FIELDS = {"base64": ("type", "media_type", "data"), "file": ("type", "file_id")}
_EVERY_BLOCK = {"type", "cache_control"}  # a hint to caches; here every prefix is cached


# What a chat calls its parameters, and what they are called here.
OWN_NAMES = {
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function(?=\.)": r"\1",
    r"tool_choice\.function\.name": "tool_choice.name",
    r"response_format(\.json_schema)?": "output_config.format",
}


class PromptFields(Body):
    """What makes the prompt; the body of a request that counts its tokens."""

    messages: list[Any]
    model: str
    system: SystemText = None
    tools: list[Any] | None = None
    tool_choice: AnyObject = None
    thinking: AnyObject = None
    output_config: AnyObject = None
    context_management: AnyObject = None
    cache_control: AnyObject = None  # a hint to caches; here every prefix is cached

    def read_thinking(self) -> Thinking:
        """Return whether the model thinks; earlier reasoning is kept, as the client sends it on purpose.

        Raises: ApiError.
        """
        return Thinking(_thinks(self.thinking), keep=True)

    def chat_messages(self) -> list[dict[str, Any]]:
        """Return the messages of a chat. Raises: ApiError."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": text} for text in _system_texts(self.system)]
        for index, message in enumerate(self.messages):
            messages += _read_message(message, f"messages[{index}]")
        if self.messages and messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            messages[-1]["partial"] = True  # a reply that the client has begun
        return messages

    def chat_tools(self) -> list[dict[str, Any]]:
        """Return the declarations of tools. Raises: ApiError."""
        return [_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or [])]

    def chat_tool_choice(self) -> tuple[Any, bool]:
        """Return the tool choice of a chat, and whether several calls may come at once. Raises: ApiError."""
        choice = self.tool_choice
        if choice is None:
            return None, True
        if not isinstance(choice, Mapping) or choice.get("type") not in ("auto", "any", "tool", "none"):
            raise bad_request("tool_choice", f"expected the type auto, any, tool or none, got {shown(choice)}")
        check_fields(choice, ("type", "name", "disable_parallel_tool_use"), "tool_choice", "a choice")
        single = choice.get("disable_parallel_tool_use", False)
        if not isinstance(single, bool):
            raise bad_request("tool_choice.disable_parallel_tool_use", f"expected true or false, got {shown(single)}")
        kind = choice["type"]
        if kind == "tool":
            return {"type": "function", "function": {"name": choice.get("name")}}, not single
        return {"any": "required"}.get(kind, kind), not single

    def check_fixed(self) -> None:
        """Refuse what this server does not do. Raises: ApiError."""
        # Some clients send an empty one.
        if self.context_management not in (None, {}, {"edits": []}):
            raise bad_request("context_management", "expected none: this server drops nothing of a conversation")
        if self.output_config is not None:
            if not isinstance(self.output_config, Mapping):
                raise bad_request("output_config", f"expected an object, got {shown(self.output_config)}")
            for name, value in self.output_config.items():
                if name == "effort" and value in ("low", "medium", "high", "xhigh", "max"):
                    continue  # K2.6 thinks as much as it wants
                if name != "format" and value is not None:
                    raise bad_request(f"output_config.{name}", f"expected no such field or value, got {shown(value)}")

    def response_format(self) -> Any:
        """Return the `response_format` of a chat. Raises: ApiError."""
        wanted = (self.output_config or {}).get("format")
        if wanted is None:
            return None
        if not isinstance(wanted, Mapping) or wanted.get("type") != "json_schema":
            raise bad_request("output_config.format", f"expected the type json_schema, got {shown(wanted)}")
        return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}


class MessagesRequest(PromptFields):
    """The body of a request for a message."""

    max_tokens: int
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    metadata: AnyObject = None  # the client's own names for its users
    service_tier: str = "auto"

    def check_fixed(self) -> None:
        """Refuse what this server does not do. Raises: ApiError."""
        super().check_fixed()
        stops = self.stop_sequences or []
        if len(stops) > MAX_STOP_STRINGS:
            raise bad_request("stop_sequences", f"expected at most {MAX_STOP_STRINGS}, got {len(stops)}")
        for index, text in enumerate(stops):
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                expected = f"expected 1 to {MAX_STOP_CHARACTERS} characters"
                raise bad_request(f"stop_sequences[{index}]", f"{expected}, got {len(text)}")
        if self.service_tier not in ("auto", "standard_only"):
            raise bad_request("service_tier", f"expected auto or standard_only, got {shown(self.service_tier)}")

    def sampling(self) -> SamplingFields:
        """Return the parameters of sampling."""
        return SamplingFields(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, stop=self.stop_sequences or None
        )


def _thinks(thinking: Any) -> bool:
    """Read `{"type": "enabled", "budget_tokens": N}`; without it a message is answered at once, as Anthropic does."""
    if thinking is None:
        return False
    if not isinstance(thinking, Mapping) or thinking.get("type") not in ("enabled", "disabled", "adaptive"):
        raise bad_request("thinking", f"expected the type enabled, disabled or adaptive, got {shown(thinking)}")
    for name, value in thinking.items():
        # A budget is an upper bound that K2.6 knows nothing of; `max_tokens` bounds thinking and answer together.
        if name == "budget_tokens":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad_request("thinking.budget_tokens", f"expected a positive integer, got {shown(value)}")
        elif name == "display":
            if value not in (None, "summarized"):
                raise bad_request("thinking.display", f"expected summarized, got {shown(value)}")
        elif name != "type":
            raise bad_request(f"thinking.{name}", "expected no such field")
    return bool(thinking["type"] != "disabled")


def _system_texts(system: Any) -> Iterable[str]:
    """Yield the system prompt as one text, or nothing. Raises: ApiError."""
    if system is None or system in ("", []):
        return
    if isinstance(system, str):
        yield system
        return
    if not isinstance(system, list):
        raise bad_request("system", f"expected a text or a list of text blocks, got {shown(system)}")
    texts = []
    for index, block in enumerate(system):
        place = f"system[{index}]"
        if _kind(block, place) != "text":
            raise bad_request(f"{place}.type", f"expected text, got {shown(block['type'])}")
        texts.append(text_field(block, "text", place))
    yield "\n\n".join(texts)


def _read_message(message: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(message, Mapping):
        raise bad_request(place, f"expected an object, got {shown(message)}")
    role = message.get("role")
    if role not in ("user", "assistant", "system"):
        raise bad_request(f"{place}.role", f"expected user, assistant or system, got {shown(role)}")
    check_fields(message, ("role", "content"), place, "a message")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise bad_request(f"{place}.content", f"expected a text or a list of blocks, got {shown(content)}")
    read = _read_assistant if role == "assistant" else _read_user
    blocks = [(block, f"{place}.content[{number}]") for number, block in enumerate(content)]
    return read(role, blocks)


def _read_user(role: str, blocks: list[tuple[Any, str]]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for block, place in blocks:
        kind = _kind(block, place)
        if kind == "text":
            parts.append({"type": "text", "text": text_field(block, "text", place)})
        elif kind == "image":
            parts.append(_read_image(block, place))
        elif kind == "tool_result":
            results.append(
                {
                    "role": "tool",
                    "tool_call_id": text_field(block, "tool_use_id", place),
                    "content": _result_content(block, place),
                }
            )
        else:
            raise bad_request(
                f"{place}.type", f"expected text, image or tool_result in a message of {role}, got {kind}"
            )
    return results + ([{"role": role, "content": parts}] if parts or not results else [])


def _read_image(block: Mapping[str, Any], place: str) -> dict[str, Any]:
    source, here = block.get("source"), f"{place}.source"
    if not isinstance(source, Mapping):
        raise bad_request(here, f"expected an object, got {shown(source)}")
    kind = source.get("type")
    if not isinstance(kind, str) or kind not in _SOURCE_FIELDS:
        why = ": this server opens no connection for a request" if kind == "url" else ""
        raise bad_request(f"{here}.type", f"expected base64 or file, got {shown(kind)}{why}")
    check_fields(source, _SOURCE_FIELDS[kind], here, f"a source of type {kind}")
    if kind == "file":
        return image_part(FILE_SCHEME + text_field(source, "file_id", here), f"{here}.file_id")
    media_type, data = source.get("media_type"), text_field(source, "data", here)
    if media_type not in IMAGE_TYPES:
        raise bad_request(f"{here}.media_type", f"expected one of {', '.join(IMAGE_TYPES)}, got {shown(media_type)}")
    return image_part(f"data:{media_type};base64,{data}", f"{here}.data")


def _result_content(block: Mapping[str, Any], place: str) -> str | list[dict[str, Any]]:
    """Return the result of a tool as one text, or as parts where there is an image. Raises: ApiError."""
    content = block.get("content")
    if content is None or isinstance(content, str):
        parts = [{"type": "text", "text": content or ""}]
    elif isinstance(content, list):
        parts = [_read_result(part, f"{place}.content[{number}]") for number, part in enumerate(content)]
    else:
        raise bad_request(f"{place}.content", f"expected a text or a list of blocks, got {shown(content)}")
    is_error = block.get("is_error")
    if not isinstance(is_error, (bool, type(None))):
        raise bad_request(f"{place}.is_error", f"expected true or false, got {shown(is_error)}")
    for part in parts[:-1]:
        if part["type"] == "text":
            part["text"] += "\n"  # after an image the prompt has one anyway
    if is_error:
        parts.insert(0, {"type": "text", "text": "Error: "})
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _read_result(part: Any, place: str) -> dict[str, Any]:
    kind = _kind(part, place)
    if kind == "text":
        return {"type": "text", "text": text_field(part, "text", place)}
    if kind == "image":
        return _read_image(part, place)
    raise bad_request(f"{place}.type", f"expected text or image, got {kind}")


def _read_assistant(role: str, blocks: list[tuple[Any, str]]) -> list[dict[str, Any]]:
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for block, place in blocks:
        kind = _kind(block, place)
        if kind == "text":
            texts.append(text_field(block, "text", place))
        elif kind == "thinking":
            reasoning.append(text_field(block, "thinking", place))
        elif kind == "tool_use":
            name, given = text_field(block, "name", place), block.get("input")
            arguments = given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
            calls.append(
                {
                    "id": text_field(block, "id", place),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
            )
        else:
            raise bad_request(
                f"{place}.type", f"expected text, thinking or tool_use in a message of {role}, got {kind}"
            )
    message: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _kind(block: Any, place: str) -> str:
    """Return the type of a block whose fields are all known. Raises: ApiError."""
    if not isinstance(block, Mapping):
        raise bad_request(place, f"expected an object, got {shown(block)}")
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in _BLOCK_FIELDS:
        raise bad_request(f"{place}.type", f"expected one of {', '.join(_BLOCK_FIELDS)}, got {shown(kind)}")
    check_fields(block, _EVERY_BLOCK | _BLOCK_FIELDS[kind], place, f"a block of type {kind}")
    return kind


def _read_tool(tool: Any, place: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise bad_request(place, f"expected an object, got {shown(tool)}")
    if tool.get("type") not in (None, "custom"):
        raise bad_request(f"{place}.type", f"expected custom: the client runs all tools, got {shown(tool['type'])}")
    check_fields(tool, _TOOL_FIELDS, place, "a tool")
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema", {"type": "object"})}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}

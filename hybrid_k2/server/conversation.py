"""Messages and tools of a chat request, checked before the protocol reads them.

The protocol is lenient, as a chat template is; a server says when it does not know a field, so that nothing of a
request is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_k2.errors import shown
from hybrid_k2.server.body import check_fields
from hybrid_k2.server.errors import bad_request
from hybrid_k2.server.images import GivenImage, check_detail, given_images, image_part
from hybrid_k2.server.options import Limits

ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_FIELDS = frozenset({"role", "content", "name", "partial"})
_OF_ROLE = {
    "assistant": frozenset({"tool_calls", "reasoning_content", "reasoning", "refusal"}),
    "tool": frozenset({"tool_call_id"}),
}
_EVERY_PART = {"type", "cache_control"}  # a hint to caches of other servers; here every prefix is cached
_PART_FIELDS = {"text": {"text"}, "image_url": {"image_url"}, "image": {"image"}}
_TOOL_FIELDS = frozenset({"type", "function", "cache_control"})
_FUNCTION_FIELDS = frozenset({"name", "description", "parameters", "strict"})
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.$-]{1,128}")


def check_messages(messages: Sequence[Any], limits: Limits) -> list[dict[str, Any]]:
    """Return the messages without null fields, each image a `GivenImage`; a developer speaks as the system.

    Raises: ApiError.
    """
    if not messages:
        raise bad_request("messages", "expected at least one message, got none")
    if len(messages) > limits.messages:
        raise bad_request("messages", f"expected at most {limits.messages}, got {len(messages)}")
    checked = [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    images = list(given_images(checked))
    if len(images) > limits.images:
        problem = f"expected at most {limits.images} images in a request, got {len(images)}"
        raise bad_request(images[limits.images].place, problem)
    return checked


def _check_message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise bad_request(place, f"expected an object, got {shown(message)}")
    fields = {name: value for name, value in message.items() if value is not None}
    role = fields.get("role")
    if role not in ROLES:
        raise bad_request(f"{place}.role", f"expected one of {', '.join(ROLES)}, got {shown(role)}")
    check_fields(fields, _MESSAGE_FIELDS | _OF_ROLE.get(role, frozenset()), place, f"a message of {role}")
    if fields.pop("refusal", ""):
        raise bad_request(f"{place}.refusal", "expected none: this model has no field for it")
    if isinstance(fields.get("content"), list):
        fields["content"] = [
            _check_part(part, f"{place}.content[{number}]") for number, part in enumerate(fields["content"])
        ]
    return fields | {"role": "system" if role == "developer" else role}


def _check_part(part: Any, place: str) -> Any:
    if not isinstance(part, Mapping):
        raise bad_request(place, f"expected an object, got {shown(part)}")
    kind = "text" if part.get("type") is None else part["type"]
    if not isinstance(kind, str) or kind not in _PART_FIELDS:
        video = ": this version reads no video" if kind in ("video", "video_url") else ""
        raise bad_request(f"{place}.type", f"expected text or image_url, got {shown(kind)}{video}")
    check_fields(part, _EVERY_PART | _PART_FIELDS[kind], place, f"a part of type {kind}")
    if kind == "text" or isinstance(part.get("image"), GivenImage):
        return part
    return _read_image(part.get(kind), f"{place}.{kind}")


def _read_image(image: Any, place: str) -> dict[str, Any]:
    """Read `{"url": ..., "detail": ...}`, or the URL alone. Raises: ApiError."""
    if not isinstance(image, Mapping):
        return image_part(image, place)
    check_fields(image, ("url", "detail"), place, "an image")
    check_detail(image.get("detail"), place)
    return image_part(image.get("url"), f"{place}.url")


def check_tools(tools: Sequence[Any] | None, limits: Limits) -> list[dict[str, Any]]:
    """Check the declarations of tools. Raises: ApiError."""
    tools = tools or []
    if len(tools) > limits.tools:
        raise bad_request("tools", f"expected at most {limits.tools}, got {len(tools)}")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        name = _check_tool(tool, f"tools[{index}]", limits)
        if name in names:
            raise bad_request(f"tools[{index}].function.name", f"expected every name once, got {name!r} again")
        names.add(name)
    return list(tools)


def _check_tool(tool: Any, place: str, limits: Limits) -> str:
    if not isinstance(tool, Mapping):
        raise bad_request(place, f"expected an object, got {shown(tool)}")
    if tool.get("type") not in ("function", "builtin_function"):
        raise bad_request(f"{place}.type", f"expected function or builtin_function, got {shown(tool.get('type'))}")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise bad_request(f"{place}.function", f"expected an object, got {shown(function)}")
    check_fields(tool, _TOOL_FIELDS, place, "a tool")
    check_fields(function, _FUNCTION_FIELDS, f"{place}.function", "a function")
    name = function.get("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise bad_request(
            f"{place}.function.name", f"expected 1 to 128 letters, digits and any of _ . $ -, got {shown(name)}"
        )
    parameters = function.get("parameters")
    if parameters is not None:
        check_schema(parameters, f"{place}.function.parameters", limits)
    return name


def check_schema(schema: Any, place: str, limits: Limits) -> Mapping[str, Any]:
    """Return a JSON schema; refuse one that is no object, or too deep or large to compile. Raises: ApiError."""
    if not isinstance(schema, Mapping):
        raise bad_request(place, f"expected a JSON schema, an object, got {shown(schema)}")
    size = 0
    level: list[Any] = [schema]
    for _ in range(limits.schema_depth):
        inner: list[Any] = []
        for value in level:
            size += len(value) if isinstance(value, (str, Mapping, list)) else 8
            if isinstance(value, Mapping):
                size += sum(len(key) for key in value)
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        if size > limits.schema_bytes:
            raise bad_request(place, f"expected at most {limits.schema_bytes} characters, got more")
        if not inner:
            return schema
        level = inner
    raise bad_request(place, f"expected at most {limits.schema_depth} levels, got more")


def read_tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    """Return `auto`, `none`, `required`, or `=NAME` for one tool. Raises: ApiError."""
    if choice is None:
        return "auto"
    if choice in ("none", "auto"):
        return str(choice)
    if choice == "required":
        if not tools:
            raise bad_request("tool_choice", "expected tools beside required, got none")
        return "required"
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or choice.get("type") != "function":
        raise bad_request("tool_choice", f"expected none, auto, required or a function, got {shown(choice)}")
    check_fields(choice, ("type", "function"), "tool_choice", "a choice")
    check_fields(choice["function"], ("name",), "tool_choice.function", "a choice")
    if name not in {tool["function"]["name"] for tool in tools}:
        raise bad_request("tool_choice.function.name", f"expected the name of a tool, got {shown(name)}")
    return f"={name}"

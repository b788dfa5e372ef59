"""The messages of a request, checked once and put into one form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_k2.errors import RequestError

MEDIA_OF_TYPE = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


@dataclass(frozen=True)
class Media:
    """An image or a video inside a message's content, as it came."""

    kind: str  # "image" or "video"
    source: object = field(default=None, repr=False)  # of an image; checked when it is decoded: `image_source`
    key: str = "image_url"  # where the part has it


@dataclass(frozen=True)
class Call:
    """A tool call of an earlier assistant message: the id as the client gave it, the arguments as text."""

    id: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One checked message; what the request left out is empty."""

    role: str
    speaker: str
    content: tuple[str | Media, ...]
    reasoning: str
    tool_calls: tuple[Call, ...]
    tool_call_id: str
    partial: bool  # the last message of a request, to be continued


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Check the messages of a request.

    Any role is taken. A key that is null counts as absent. Tool arguments may be text (kept to the byte,
    whether JSON or not), any JSON value, or absent (`{}`).
    `partial` counts on the last message only: it asks to continue it.
    Raises: RequestError naming the message by its index.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages: expected a list, got {type(messages).__name__}")
    last = len(messages) - 1
    return [_read_message(message, f"messages[{index}]", index == last) for index, message in enumerate(messages)]


def _read_message(message: object, place: str, is_last: bool) -> Message:
    fields = _object(message, place)
    role = fields.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{place}.role: expected text, got {_kind(role)}")
    assistant = role == "assistant"
    return Message(
        role=role,
        speaker=_text(fields, "name", place) or role,
        content=tuple(_read_content(fields.get("content"), f"{place}.content")),
        reasoning=_read_reasoning(fields, place) if assistant else "",
        tool_calls=tuple(_read_calls(fields.get("tool_calls"), f"{place}.tool_calls")) if assistant else (),
        tool_call_id=_text(fields, "tool_call_id", place) if role == "tool" else "",
        partial=_read_partial(fields, place) and is_last,
    )


def _read_partial(fields: Mapping[str, Any], place: str) -> bool:
    partial = fields.get("partial")
    if partial is not None and not isinstance(partial, bool):
        raise RequestError(f"{place}.partial: expected true or false, got {_kind(partial)}")
    if partial and (fields.get("role") != "assistant" or fields.get("tool_calls")):
        got = "tool calls" if fields.get("role") == "assistant" else f"role {fields.get('role')}"
        raise RequestError(f"{place}.partial: expected it on an assistant message without tool calls, got {got}")
    return bool(partial)


def _read_content(content: object, place: str) -> Iterator[str | Media]:
    if content is None:
        return
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{place}: expected text, a list of parts or null, got {_kind(content)}")
    for index, part in enumerate(content):
        fields = _object(part, f"{place}[{index}]")
        kind = fields.get("type")
        if isinstance(kind, str) and kind in MEDIA_OF_TYPE:
            yield _read_media(MEDIA_OF_TYPE[kind], fields)
        elif isinstance(fields.get("text"), str):
            yield fields["text"]
        else:
            raise RequestError(f"{place}[{index}].text: expected text, got {_kind(fields.get('text'))}")


def _read_media(kind: str, fields: Mapping[str, Any]) -> Media:
    if kind != "image":
        return Media(kind)
    key = "image" if fields.get("image_url") is None and fields.get("image") is not None else "image_url"
    source = fields.get(key)
    return Media(kind, source.get("url") if isinstance(source, Mapping) else source, key)


def _read_reasoning(fields: Mapping[str, Any], place: str) -> str:
    # `reasoning`, where it is present, wins over `reasoning_content` even when it is empty.
    key = "reasoning" if fields.get("reasoning") is not None else "reasoning_content"
    return _text(fields, key, place)


def _read_calls(calls: object, place: str) -> Iterator[Call]:
    if calls is None:
        return
    if not isinstance(calls, (list, tuple)):
        raise RequestError(f"{place}: expected a list, got {_kind(calls)}")
    for index, call in enumerate(calls):
        here = f"{place}[{index}]"
        fields = _object(call, here)
        function = _object(fields.get("function"), f"{here}.function")
        if not isinstance(fields.get("id"), str):
            raise RequestError(f"{here}.id: expected text, got {_kind(fields.get('id'))}")
        yield Call(fields["id"], _read_arguments(function.get("arguments"), f"{here}.function.arguments"))


def _read_arguments(arguments: object, place: str) -> str:
    if arguments is None:
        return "{}"
    if isinstance(arguments, str):
        return arguments
    return dump_json(arguments, place)


def dump_json(value: object, place: str, separators: tuple[str, str] = (", ", ": ")) -> str:
    """Write a JSON value as the chat template writes it: keys in order, non-ASCII as it is.

    Raises: RequestError when the value is no JSON or is nested too deeply.
    """
    try:
        return json.dumps(value, ensure_ascii=False, separators=separators)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{place}: expected JSON data, got {_kind(value)}: {error}") from error


def _object(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{place}: expected an object, got {_kind(value)}")
    return value


def _text(fields: Mapping[str, Any], key: str, place: str) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RequestError(f"{place}.{key}: expected text, got {_kind(value)}")
    return value


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__

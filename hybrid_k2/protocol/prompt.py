"""Messages to a prompt, in the chat format of Kimi K2.6.

The same text as the checkpoint's chat template, written natively: no template of a checkpoint is executed.
A prompt is a row of segments. Control segments become control tokens; what a user, a tool or a client
supplied is ordinary text and stays that, whatever it looks like.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrid_k2.errors import RequestError
from hybrid_k2.protocol.images import Image, ImageFormat, image_token, read_image
from hybrid_k2.protocol.media_source import media_source
from hybrid_k2.protocol.messages import Call, Media, Message, read_messages
from hybrid_k2.protocol.tokenizer import Tokenizer
from hybrid_k2.protocol.tokens import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    CALL_END,
    IM_ASSISTANT,
    IM_END,
    IM_MIDDLE,
    IM_SYSTEM,
    IM_USER,
    MEDIA_BEGIN,
    MEDIA_CONTENT,
    MEDIA_END,
    MEDIA_PAD,
    SECTION_BEGIN,
    SECTION_END,
    THINK_BEGIN,
    THINK_END,
    VIDEO_PLACEHOLDER,
)
from hybrid_k2.protocol.tool_declaration import declare_tools
from hybrid_k2.protocol.videos import Video, read_video

ROLE_TOKENS = {"user": IM_USER, "assistant": IM_ASSISTANT}  # every other role speaks as the system


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt: ordinary text, or the name of one control token."""

    text: str
    control: bool


def render_segments(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = True,
) -> list[Segment]:
    """Render a conversation; no two neighbours are both ordinary text.

    Reasoning is written out for the messages after the last assistant message without tool calls (the turn in
    progress), and for all of them with `preserve_thinking`. A last message that is `partial` is left open in place of
    the generation prompt.
    Raises: RequestError for malformed messages or tools.
    """
    pieces = _conversation(read_messages(messages), tools, thinking, preserve_thinking, add_generation_prompt)
    return list(_merge_ordinary(pieces))


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = True,
) -> str:
    """Render a conversation to the text that the checkpoint's chat template gives.

    Raises: RequestError for malformed messages or tools.
    """
    segments = render_segments(messages, tools, thinking, preserve_thinking, add_generation_prompt)
    return "".join(segment.text for segment in segments)


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = True,
    most: int | None = None,
) -> list[int]:
    """Encode a conversation; only the control tokens of the chat format become control ids.

    Where no text looks like a special token, the ids are those of the rendered text. Encoding stops when there are more
    than `most` ids.
    Raises: RequestError for malformed messages or tools, and for images and video.
    """
    checked = read_messages(messages)
    _refuse_media(checked)
    return _encode(tokenizer, checked, tools, thinking, preserve_thinking, add_generation_prompt, most)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    *,
    images: ImageFormat | None,
    most: int | None = None,
) -> tuple[list[int], dict[int, Image]]:
    """Encode a conversation with its images and videos, as `encode_prompt` does: the ids, and images by their digests.

    Each image, and each clip of a video, stands as the ids of its rows (`image_token`) where the rendered text has one
    `<|media_pad|>`. Media are decoded one after the other, videos first, and no more of them when there are more than
    `most` ids; of the ids that are returned then, only the number is of use. `images` None: the checkpoint reads text
    only.
    Raises: RequestError for malformed messages or tools, and for images and videos that cannot be read.
    """
    checked = read_messages(messages)
    if images is None:
        _refuse_media(checked)
    else:
        checked = _read_videos(checked, images, most)
    ids = _encode(tokenizer, checked, tools, thinking, preserve_thinking, True, most)
    if images is None or (most is not None and len(ids) > most):
        return ids, {}
    expanded: list[int] = []
    read: dict[int, Image] = {}
    rest = 0  # the ids from here on are not in `expanded`
    for place, media in _images_of(_find_media(checked)):
        pad = ids.index(tokenizer.token_id(MEDIA_PAD), rest)  # no text gives this id, only an image
        image = _image(media, images, place)
        expanded += ids[rest:pad]
        expanded += (image_token(image.digest, row) for row in range(image.tokens))
        read[image.digest] = image
        rest = pad + 1
        if most is not None and len(expanded) + len(ids) - rest > most:
            break
    return expanded + ids[rest:], read


def reply_thinks(messages: Sequence[Mapping[str, Any]], thinking: bool = True) -> bool:
    """Say whether the reply begins inside reasoning: not where it continues an answer that has begun.

    Raises: RequestError for malformed messages.
    """
    checked = read_messages(messages)
    return thinking is not False and not (checked and checked[-1].partial and any(checked[-1].content))


def _encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    thinking: bool,
    preserve_thinking: bool,
    add_generation_prompt: bool,
    most: int | None,
) -> list[int]:
    pieces = _conversation(messages, tools, thinking, preserve_thinking, add_generation_prompt)
    return tokenizer.encode_parts([(segment.text, segment.control) for segment in _merge_ordinary(pieces)], most)


def _conversation(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    thinking: bool,
    preserve_thinking: bool,
    add_generation_prompt: bool,
) -> Iterator[Segment]:
    if tools:
        yield from _framed(IM_SYSTEM, "tool_declare", [_ordinary(declare_tools(tools))])
    begun = messages[-1] if add_generation_prompt and messages and messages[-1].partial else None
    closed = messages[:-1] if begun else messages
    history = 0 if preserve_thinking else _history_length(closed)
    show_reasoning = preserve_thinking or thinking is not False
    for index, message in enumerate(closed):
        token = ROLE_TOKENS.get(message.role, IM_SYSTEM)
        yield from _framed(token, message.speaker, _body(message, show_reasoning and index >= history))
    if begun:
        yield from _begun(begun, thinking, show_reasoning)
    elif add_generation_prompt:
        yield from (_control(IM_ASSISTANT), _ordinary("assistant"), _control(IM_MIDDLE), _control(THINK_BEGIN))
        if thinking is False:
            yield _control(THINK_END)


def _history_length(messages: Sequence[Message]) -> int:
    """Count the messages up to and including the last assistant message without tool calls."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant" and not messages[index].tool_calls:
            return index + 1
    return 0


def _framed(token: str, speaker: str, body: Iterable[Segment]) -> Iterator[Segment]:
    yield from (_control(token), _ordinary(speaker), _control(IM_MIDDLE))
    yield from body
    yield _control(IM_END)


def _begun(message: Message, thinking: bool, show_reasoning: bool) -> Iterator[Segment]:
    """Write an assistant message up to where the model goes on; without content, that is inside its thinking."""
    yield from (_control(IM_ASSISTANT), _ordinary(message.speaker), _control(IM_MIDDLE))
    if any(message.content) or thinking is False:
        yield from _body(message, show_reasoning)
    else:
        yield from (_control(THINK_BEGIN), _ordinary(message.reasoning))


def _body(message: Message, show_reasoning: bool) -> Iterator[Segment]:
    if message.role == "assistant":
        yield _control(THINK_BEGIN)
        if show_reasoning:
            yield _ordinary(message.reasoning)
        yield _control(THINK_END)
    elif message.role == "tool":
        yield _ordinary(f"## Return of {message.tool_call_id}\n")
    for part in message.content:
        yield from _media(part) if isinstance(part, Media) else (_ordinary(part),)
    if message.tool_calls:
        yield from _tool_calls(message.tool_calls)


def _tool_calls(calls: Sequence[Call]) -> Iterator[Segment]:
    yield _control(SECTION_BEGIN)
    for call in calls:
        yield from (_control(CALL_BEGIN), _ordinary(call.id))
        yield from (_control(ARGUMENT_BEGIN), _ordinary(call.arguments), _control(CALL_END))
    yield _control(SECTION_END)


def _media(media: Media) -> Iterator[Segment]:
    if media.kind == "image":
        yield from _pad("image")
    elif isinstance(media.source, Video):
        for clip in media.source.clips:
            yield _ordinary(clip.timestamp)
            yield from _pad("video")
    else:
        yield _control(VIDEO_PLACEHOLDER)
    yield _ordinary("\n")


def _pad(kind: str) -> Iterator[Segment]:
    yield from (_control(MEDIA_BEGIN), _ordinary(kind), _control(MEDIA_CONTENT))
    yield from (_control(MEDIA_PAD), _control(MEDIA_END))


def _find_media(messages: Sequence[Message]) -> Iterator[tuple[str, Media]]:
    """Yield images and videos in their order, with their places."""
    for index, message in enumerate(messages):
        for number, part in enumerate(message.content):
            if isinstance(part, Media):
                yield f"messages[{index}].content[{number}]", part


def _refuse_media(messages: Sequence[Message]) -> None:
    for place, media in _find_media(messages):
        raise RequestError(f"{place}: expected text, got {media.kind}", hint="this checkpoint reads text only")


def _read_videos(messages: Sequence[Message], format: ImageFormat, most: int | None) -> list[Message]:
    """Replace the sources of videos by what is in them; those behind `most` tokens are empty."""
    read: list[Message] = []
    tokens = 0
    for index, message in enumerate(messages):
        content = list(message.content)
        for number, part in enumerate(content):
            if isinstance(part, Media) and part.kind == "video":
                left = None if most is None else most - tokens
                place = f"messages[{index}].content[{number}].{part.key}"
                video = Video(()) if left is not None and left < 0 else _video(part, format, place, left)
                tokens += video.tokens
                content[number] = replace(part, source=video)
        read.append(replace(message, content=tuple(content)))
    return read


def _images_of(media: Iterable[tuple[str, Media]]) -> Iterator[tuple[str, Media]]:
    """Yield images and the clips of videos, one for each `<|media_pad|>`."""
    for place, one in media:
        if isinstance(one.source, Video):
            yield from ((place, replace(one, source=clip.image)) for clip in one.source.clips)
        else:
            yield f"{place}.{one.key}", one


def _video(media: Media, format: ImageFormat, place: str, most: int | None) -> Video:
    if isinstance(media.source, Video):
        return media.source
    return read_video(media_source(media, place), format, place, most)


def _image(media: Media, format: ImageFormat, place: str) -> Image:
    if not isinstance(media.source, Image):
        return read_image(media_source(media, place), format, place)
    if media.source.format != format:
        raise RequestError(f"{place}: expected an image in this checkpoint's format, got one in {media.source.format}")
    return media.source


def _merge_ordinary(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Join ordinary neighbours: text is encoded as one piece, as the tokenizer would meet it."""
    texts: list[str] = []
    for segment in segments:
        if segment.control:
            if text := "".join(texts):
                yield _ordinary(text)
            texts.clear()
            yield segment
        else:
            texts.append(segment.text)
    if text := "".join(texts):
        yield _ordinary(text)


def _control(token: str) -> Segment:
    return Segment(token, control=True)


def _ordinary(text: str) -> Segment:
    return Segment(text, control=False)

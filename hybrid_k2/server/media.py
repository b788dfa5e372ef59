"""Images and videos of requests: where a request has them, and how they become pixels.

Each dialect makes a part of a message of its images, with a `GivenMedia` in it. `MediaReader` decodes them before the
service gets the messages: beside the event loop, one at a time whatever the number of requests, and what they take is
counted with the bodies.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from hybrid_k2.errors import shown
from hybrid_k2.protocol import Image, ImageFormat, Video, media_source, read_image
from hybrid_k2.protocol.messages import Media
from hybrid_k2.server.errors import ApiError, bad_request
from hybrid_k2.server.file_store import MEDIA_PURPOSES, TEXT_PURPOSES, FileStore
from hybrid_k2.server.metrics import Metrics
from hybrid_k2.server.run import unless_gone
from hybrid_k2.server.video_process import check_video_apart, read_video_apart

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")
RECENT_BYTES = 128 << 20  # of pixels: a dozen of the largest images, or half a minute of a video
FILE_SCHEME = "ms://"  # before the id of a file, as Moonshot's API has it
Read = TypeVar("Read")


@dataclass(frozen=True)
class GivenMedia:
    """An image or a video as its request has it: a `data:` URI or that of a file, and the place in its dialect."""

    kind: str  # "image" or "video"
    url: str = field(repr=False)
    place: str


def media_part(kind: str, url: object, place: str) -> dict[str, Any]:
    """Return media as a part of a message. Raises: ApiError for what is neither data nor a file of this server."""
    if not isinstance(url, str) or not (url[:5].lower() == "data:" or url.startswith(FILE_SCHEME)):
        expected = f"expected data:{kind}/...;base64,... or {FILE_SCHEME} and the id of a file, got {_shown_url(url)}"
        raise bad_request(place, f"{expected}: this server opens no connection for a request")
    return {"type": kind, kind: GivenMedia(kind, url, place)}


def image_part(url: object, place: str) -> dict[str, Any]:
    """Return an image as a part of a message. Raises: ApiError for what is neither data nor a file of this server."""
    return media_part("image", url, place)


def check_detail(detail: object, place: str) -> None:
    """Refuse a `detail` that is none. K2.6 sees an image in one way, whatever the detail. Raises: ApiError."""
    if detail not in (None, "auto", "low", "high", "original"):
        raise bad_request(f"{place}.detail", f"expected auto, low, high or original, got {shown(detail)}")


def given_media(messages: Sequence[Mapping[str, Any]]) -> Iterator[GivenMedia]:
    """Yield the images and videos of messages in their order."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if (media := media_of(part)) is not None:
                yield media


def media_of(part: Mapping[str, Any]) -> GivenMedia | None:
    """Return the image or video that a part of a message is."""
    found = part.get("image", part.get("video"))
    return found if isinstance(found, GivenMedia) else None


class _Recent:
    """Keep the images or videos that were used last: a conversation sends all of its own again with each turn.

    Each owner has its own, so that nobody can tell from the time of an answer what others sent. For one thread.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, bytes], Image | Video] = {}  # from the least to the most recently used
        self._bytes = 0

    def get(self, key: tuple[str, bytes]) -> Image | Video | None:
        """Return what an owner's file holds, by the file's digest."""
        return self._kept.get(key)

    def keep(self, key: tuple[str, bytes], media: Image | Video) -> None:
        """Keep an image or a video, at the cost of those that were used least recently."""
        if key in self._kept:
            self._bytes -= self._kept.pop(key).nbytes
        self._kept[key] = media
        self._bytes += media.nbytes
        while self._bytes > RECENT_BYTES:
            self._bytes -= self._kept.pop(next(iter(self._kept))).nbytes


class MediaReader:
    """Decode the images of all requests in a thread of its own, and the videos in another: nobody else waits for them.

    One thread each: a large image takes gigabytes while it is decoded, and a video, in a process of its own, minutes.
    """

    def __init__(self, files: FileStore, metrics: Metrics) -> None:
        self._files = files
        self._metrics = metrics
        self._recent = {kind: _Recent() for kind in MEDIA_PURPOSES}  # each is its thread's alone
        self._threads = {kind: ThreadPoolExecutor(1, thread_name_prefix=kind) for kind in MEDIA_PURPOSES}

    async def read_messages(
        self, request: Request, messages: Sequence[Mapping[str, Any]], wanted: ImageFormat | None, most: int
    ) -> list[Mapping[str, Any]]:
        """Return the messages with their media decoded; `wanted` is None for a model that reads text only.

        Media of more than `most` tokens together are not all decoded.
        Raises: ApiError, RequestError, which name the part; ClientGoneError.
        """
        media = list(given_media(messages))
        if not media:
            return list(messages)
        read = await unless_gone(request, self._read_all(request, media, wanted, most))
        return [_with_media(message, read) for message in messages]

    async def check_upload(self, kind: str, content: bytes, wanted: ImageFormat | None) -> None:
        """Refuse a file that is no image, or no video. Raises: ApiError, RequestError."""
        if wanted is None:
            raise bad_request("purpose", f"expected {' or '.join(TEXT_PURPOSES)}: this model reads text only")
        if kind == "image":
            await self._in_thread(kind, partial(read_image, content, wanted, "file"))
        else:
            await self._in_thread(kind, partial(check_video_apart, content, "file"))

    async def _read_all(
        self, request: Request, media: Sequence[GivenMedia], wanted: ImageFormat | None, most: int
    ) -> dict[str, Image | Video]:
        """Return the images and videos by their places."""
        if wanted is None:
            raise bad_request(media[0].place, f"expected text, got {media[0].kind}: this model reads text only")
        read: dict[str, Image | Video] = {}
        tokens = 0
        for given in media:
            gone = threading.Event()
            work = partial(self._read, request.state.owner, given, wanted, most - tokens, gone)
            try:
                found = await self._in_thread(given.kind, work)
            finally:
                gone.set()
            self._metrics.read(given.kind)
            request.state.hold(found.nbytes)
            read[given.place] = found
            tokens += found.tokens
            if tokens > most:
                problem = f"expected at most {most} tokens, got images and videos of {tokens} or more"
                raise bad_request("messages", problem, "context_length_exceeded")
        for kind in MEDIA_PURPOSES:
            if count := sum(given.kind == kind for given in media):
                request.state.log[f"{kind}s"] = count
        return read

    async def _in_thread(self, kind: str, work: partial[Read]) -> Read:
        return await asyncio.get_running_loop().run_in_executor(self._threads[kind], work)

    def _read(
        self, owner: str, given: GivenMedia, wanted: ImageFormat, most: int, gone: threading.Event
    ) -> Image | Video:
        if given.url.startswith(FILE_SCHEME):
            data = self._file(owner, given)
        else:
            data = media_source(Media(given.kind, given.url), given.place)
        key, recent = (owner, hashlib.sha256(data).digest()), self._recent[given.kind]
        found = recent.get(key)
        if found is None and given.kind == "image":
            found = read_image(data, wanted, given.place)
        elif found is None:
            found = read_video_apart(data, wanted, given.place, most, gone.is_set)
            if found.tokens > most:
                return found  # only its beginning was read
        recent.keep(key, found)
        return found

    def _file(self, owner: str, given: GivenMedia) -> bytes:
        file_id = given.url[len(FILE_SCHEME) :]
        try:
            file = self._files.find(owner, file_id)
        except ApiError:
            raise bad_request(given.place, f"expected the id of a file, got {shown(file_id)}") from None
        if file.purpose not in MEDIA_PURPOSES[given.kind]:
            purposes = " or ".join(MEDIA_PURPOSES[given.kind])
            raise bad_request(given.place, f"expected a file of the purpose {purposes}, got {file.purpose}")
        return file.content


def _with_media(message: Mapping[str, Any], read: Mapping[str, Image | Video]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [{**part, given.kind: read[given.place]} if (given := media_of(part)) else part for part in content]
    return {**message, "content": parts}


def _shown_url(url: object) -> str:
    return shown(url[:100] if isinstance(url, str) else url)  # not a copy of megabytes

"""Images of requests: where a request has them, and how they become pixels.

Each dialect makes a part of a message of its images, with a `GivenImage` in it. `ImageReader` decodes them before the
service gets the messages: beside the event loop, one at a time whatever the number of requests, and what they take is
counted with the bodies.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request

from hybrid_k2.errors import shown
from hybrid_k2.protocol import Image, ImageFormat, image_source, read_image
from hybrid_k2.protocol.messages import Media
from hybrid_k2.server.errors import ApiError, bad_request
from hybrid_k2.server.file_store import IMAGE_PURPOSES, TEXT_PURPOSES, FileStore
from hybrid_k2.server.metrics import Metrics
from hybrid_k2.server.run import unless_gone

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")
RECENT_BYTES = 128 << 20  # of pixels: a dozen of the largest images
FILE_SCHEME = "ms://"  # before the id of a file, as Moonshot's API has it


@dataclass(frozen=True)
class GivenImage:
    """An image as its request has it: a `data:` URI or that of a file, and the place in the words of the dialect."""

    url: str = field(repr=False)
    place: str


def image_part(url: object, place: str) -> dict[str, Any]:
    """Return an image as a part of a message. Raises: ApiError for what is neither data nor a file of this server."""
    if not isinstance(url, str) or not (url[:5].lower() == "data:" or url.startswith(FILE_SCHEME)):
        expected = f"expected data:image/...;base64,... or {FILE_SCHEME} and the id of a file, got {_shown_url(url)}"
        raise bad_request(place, f"{expected}: this server opens no connection for a request")
    return {"type": "image", "image": GivenImage(url, place)}


def check_detail(detail: object, place: str) -> None:
    """Refuse a `detail` that is none. K2.6 sees an image in one way, whatever the detail. Raises: ApiError."""
    if detail not in (None, "auto", "low", "high", "original"):
        raise bad_request(f"{place}.detail", f"expected auto, low, high or original, got {shown(detail)}")


def given_images(messages: Sequence[Mapping[str, Any]]) -> Iterator[GivenImage]:
    """Yield the images of messages in their order."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(image := part.get("image"), GivenImage):
                yield image


class _Recent:
    """Keep the images that were used last: a conversation sends all of its own again with each turn.

    Each owner has its own, so that nobody can tell from the time of an answer what others sent. For one thread.
    """

    def __init__(self) -> None:
        self._images: dict[tuple[str, bytes], Image] = {}  # from the least to the most recently used
        self._bytes = 0

    def get(self, key: tuple[str, bytes]) -> Image | None:
        """Return the image of an owner's file, by the file's digest."""
        return self._images.get(key)

    def keep(self, key: tuple[str, bytes], image: Image) -> None:
        """Keep an image, at the cost of those that were used least recently."""
        if key in self._images:
            self._bytes -= self._images.pop(key).pixels.nbytes
        self._images[key] = image
        self._bytes += image.pixels.nbytes
        while self._bytes > RECENT_BYTES:
            self._bytes -= self._images.pop(next(iter(self._images))).pixels.nbytes


class ImageReader:
    """Decode the images of all requests, in a thread of its own: nothing but images waits for an image.

    One thread: a large image takes gigabytes while it is decoded.
    """

    def __init__(self, files: FileStore, metrics: Metrics) -> None:
        self._files = files
        self._metrics = metrics
        self._recent = _Recent()  # the thread's alone
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")

    async def read_messages(
        self, request: Request, messages: Sequence[Mapping[str, Any]], wanted: ImageFormat | None, most: int
    ) -> list[Mapping[str, Any]]:
        """Return the messages with their images decoded; `wanted` is None for a model that reads text only.

        Images of more than `most` tokens together are not all decoded.
        Raises: ApiError, RequestError, which name the image; ClientGoneError.
        """
        images = list(given_images(messages))
        if not images:
            return list(messages)
        read = await unless_gone(request, self._read_all(request, images, wanted, most))
        return [_with_images(message, read) for message in messages]

    async def check_upload(self, content: bytes, wanted: ImageFormat | None) -> None:
        """Refuse a file that is no image. Raises: ApiError, RequestError."""
        if wanted is None:
            raise bad_request("purpose", f"expected {' or '.join(TEXT_PURPOSES)}: this model reads text only")
        await self._in_thread(partial(read_image, content, wanted, "file"))

    async def _read_all(
        self, request: Request, images: Sequence[GivenImage], wanted: ImageFormat | None, most: int
    ) -> dict[str, Image]:
        """Return the images by their places."""
        if wanted is None:
            raise bad_request(images[0].place, "expected text, got an image: this model reads text only")
        read: dict[str, Image] = {}
        tokens = 0
        for given in images:
            image = await self._in_thread(partial(self._read, request.state.owner, given, wanted))
            self._metrics.image()
            request.state.hold(image.pixels.nbytes)
            read[given.place] = image
            tokens += image.tokens
            if tokens > most:
                problem = f"expected at most {most} tokens, got images of {tokens} or more"
                raise bad_request("messages", problem, "context_length_exceeded")
        request.state.log["images"] = len(read)
        return read

    async def _in_thread(self, work: partial[Image]) -> Image:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _read(self, owner: str, given: GivenImage, wanted: ImageFormat) -> Image:
        if given.url.startswith(FILE_SCHEME):
            data = self._file(owner, given)
        else:
            data = image_source(Media("image", given.url), given.place)
        key = owner, hashlib.sha256(data).digest()
        image = self._recent.get(key)
        if image is None:
            image = read_image(data, wanted, given.place)
        self._recent.keep(key, image)
        return image

    def _file(self, owner: str, given: GivenImage) -> bytes:
        file_id = given.url[len(FILE_SCHEME) :]
        try:
            file = self._files.find(owner, file_id)
        except ApiError:
            raise bad_request(given.place, f"expected the id of a file, got {shown(file_id)}") from None
        if file.purpose not in IMAGE_PURPOSES:
            purposes = " or ".join(IMAGE_PURPOSES)
            raise bad_request(given.place, f"expected a file of the purpose {purposes}, got {file.purpose}")
        return file.content


def _with_images(message: Mapping[str, Any], read: Mapping[str, Image]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [
        {**part, "image": read[given.place]} if isinstance(given := part.get("image"), GivenImage) else part
        for part in content
    ]
    return {**message, "content": parts}


def _shown_url(url: object) -> str:
    return shown(url[:100] if isinstance(url, str) else url)  # not a copy of megabytes

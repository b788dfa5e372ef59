"""Requests with images in every dialect, and what arrives of them at the service."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from hybrid_k2.protocol import Image
from tests.pictures import coded, picture, png, uri
from tests.server.conftest import Client
from tests.server.scripted import ScriptedService

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
COUNT, ESTIMATE = "/v1/messages/count_tokens", "/v1/tokenizers/estimate-token-count"
REMOTE = "https://example.com/cat.png"
# Where an image is, in each dialect, when it is the first part of a message.
CHAT_URL, RESPONSE_URL = "messages[0].content[0].image_url.url", "input[0].content[0].image_url"
SOURCE = "messages[0].content[0].source"

PICTURE = picture(32, 48)  # two tokens wide, two high: rows and columns of zeros are added
PNG = png(PICTURE)
BOMB = png(PICTURE, claimed=(60_000, 60_000))


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image_url(url: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri(PNG) if url is None else url, **more}}


def input_image(**fields: Any) -> dict[str, Any]:
    return {"type": "input_image", **(fields or {"image_url": uri(PNG)})}


def block(**source: Any) -> dict[str, Any]:
    return {"type": "image", "source": source or {"type": "base64", "media_type": "image/png", "data": coded(PNG)}}


def chat(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"model": "k2", "messages": [{"role": "user", "content": [*parts]}], **more}


def response(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"model": "k2", "input": [{"role": "user", "content": [*parts]}], **more}


def message(*blocks: Any, **more: Any) -> dict[str, Any]:
    return {"model": "k2", "max_tokens": 50, "messages": [{"role": "user", "content": [*blocks]}], **more}


def seen(service: ScriptedService) -> list[str | Image]:
    """Return the texts and images of the last request, in their order."""
    parts: list[str | Image] = []
    for one in service.requests[-1].messages or ():
        content = one.get("content") or []
        parts += [content] if isinstance(content, str) else [part.get("image", part.get("text")) for part in content]
    return parts


def check_picture(image: Any, pixels: NDArray[np.uint8] = PICTURE) -> None:
    height, width, _ = pixels.shape
    assert isinstance(image, Image)
    assert image.pixels.shape == (-(-height // 28) * 28, -(-width // 28) * 28, 3)
    assert (image.pixels[:height, :width] == pixels).all()
    assert not image.pixels[height:].any()
    assert not image.pixels[:, width:].any()


def upload(client: Client, content: bytes = PNG, purpose: str = "image", **more: Any) -> httpx.Response:
    return client.post("/v1/files", files={"file": ("cat.png", content)}, data={"purpose": purpose}, **more)


async def post_and_leave(client: Client, body: dict[str, Any], begun: threading.Event) -> None:
    """Send a chat, and be gone once something has begun; nothing may be sent to who is not there."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        raise AssertionError("nobody is there")

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
             "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("localhost", 80),
             "client": ("127.0.0.1", 5), "root_path": ""}  # fmt: skip
    work = asyncio.ensure_future(client.app(scope, receive, send))
    while not begun.is_set():
        await asyncio.sleep(0.01)
    gone.set()
    await work

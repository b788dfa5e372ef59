"""A small HTTP client for many streams in one event loop, which can also hang up wherever it likes."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

CHAT = "/v1/chat/completions"
_HANG_UP = struct.pack("ii", 1, 0)  # SO_LINGER: reset the connection instead of ending it politely
_LINE_BYTES = 1 << 24


class Exchange:
    """One request on a connection of its own."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Exchange:
        self._reader, self._writer = await asyncio.open_connection(*self._address, limit=_LINE_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def reset(self) -> None:
        """Make leaving the block a reset of the connection."""
        assert self._writer is not None
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _HANG_UP)

    async def send(self, data: bytes) -> None:
        """Write bytes as they are."""
        assert self._writer is not None
        self._writer.write(data)
        await self._writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read the status and the headers. Raises: ConnectionError."""
        status = await self._line()
        headers = {}
        while line := (await self._line()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return int(status.split()[1]), headers

    async def body(self, headers: dict[str, str]) -> bytes:
        """Read the whole body."""
        if headers.get("transfer-encoding") == "chunked":
            return b"".join([chunk async for chunk in self._chunks()])
        return await self._reader.readexactly(int(headers.get("content-length", "0")))

    async def frames(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the JSON objects of a chunked stream of events up to `[DONE]`. Raises: ConnectionError."""
        text = b""
        async for chunk in self._chunks():
            *events, text = (text + chunk).split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                if data != event:  # else a comment
                    yield json.loads(data)
        raise ConnectionError("the stream ended without [DONE]")

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            while size := int(await self._line(), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the connection ended in a chunk") from error

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        if not line:
            raise ConnectionError("the connection ended without an answer")
        return line


def post(body: bytes, path: str = CHAT, length: int | None = None) -> bytes:
    """Write a request; `length` is what its header says, if not the truth."""
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body


def get(path: str) -> bytes:
    """Write a request for a resource."""
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()

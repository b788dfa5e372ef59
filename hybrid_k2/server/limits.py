"""What headers and bodies of requests may be, checked before any of it is parsed; and how a large answer is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid_k2.server.errors import ApiError, error_response, logged, overloaded
from hybrid_k2.server.options import Limits
from hybrid_k2.server.run import ClientGoneError

VALUE_BYTES = 64  # that a value takes once it is parsed, or more; each comma of a body is counted as one
PIECE_BYTES = 64 * 2**10
# What ends the connection: it is not clear where the next request begins, or that is long in coming. After the others
# the rest of the body is read and dropped: a client that meets a closed connection while it sends does not read why.
# `Connection` does so behind the answer; where the client wants the connection closed with it, it is done before.
_ENDING = (400, 408)


@dataclass
class _Body:
    """What has come of a body, and how much memory it is taken to need with what it becomes."""

    content: bytes = b""
    weight: int = 0  # bytes
    ended: bool = False


class RequestLimits:
    """Refuse a request with too many headers, a body that is too large or packed, or one that comes too slowly.

    The bodies of all requests that have no whole answer yet are bounded together.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._weight = 0  # of all bodies, in bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body()

        def hold(more: int) -> None:
            """Count what the body became, in bytes, until the answer is whole. Raises: ApiError if there is no room."""
            self._check_room(more, body.weight)
            body.weight += more
            self._weight += more

        scope.setdefault("state", {})["hold"] = hold
        try:
            try:
                self._check_headers(scope)
                await self._read(body, receive, hold)
            except ApiError as error:
                state = scope.get("state", {})
                state.get("log", {}).update(logged(error))
                response = error_response(error, scope["path"], state.get("request_id", ""))
                if error.status in _ENDING:
                    response.headers["connection"] = "close"
                elif not body.ended and _closes_at_once(scope["headers"], scope.get("http_version")):
                    await self._drop_rest(receive)
                await response(scope, receive, send)
                return
            await self._app(scope, _replay(body.content, receive), _in_pieces(send))
        finally:
            self._weight -= body.weight

    def _check_headers(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > self._limits.headers:
            raise ApiError(431, f"headers: expected at most {self._limits.headers}, got {len(headers)}")
        size = sum(len(name) + len(value) for name, value in headers)
        if size > self._limits.header_bytes:
            raise ApiError(431, f"headers: expected at most {self._limits.header_bytes} bytes, got {size}")
        names = {name for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            # Another server before this one may go by the other header, and see another request in the same bytes.
            raise ApiError(400, "headers: expected content-length or transfer-encoding, got both")
        for name, value in headers:
            if name == b"content-encoding" and value.lower() != b"identity":
                raise ApiError(415, "content-encoding: expected a body as it is, got one that is packed")
            if name == b"content-length" and value.isdigit():
                length = int(value[:20])
                self._check_size(length)
                self._check_room(length, 0)

    async def _read(self, body: _Body, receive: Receive, hold: Callable[[int], None]) -> None:
        """Read the whole body. Raises: ApiError, ClientGoneError."""
        parts: list[bytes] = []
        size = 0
        deadline = asyncio.get_running_loop().time() + self._limits.body_s
        while not body.ended:
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except asyncio.TimeoutError:
                raise ApiError(408, f"body: expected it whole within {self._limits.body_s:g} s") from None
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            body.ended = not message.get("more_body", False)
            size += len(part)
            self._check_size(size)
            weight = len(part) + VALUE_BYTES * part.count(b",")
            hold(weight)
            parts.append(part)
        body.content = b"".join(parts)

    async def _drop_rest(self, receive: Receive) -> None:
        async def drop() -> None:
            while (await receive()).get("more_body", False):
                pass

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(drop(), self._limits.body_s)

    def _check_size(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise ApiError(413, f"body: expected at most {self._limits.body_bytes} bytes, got {size} or more")

    def _check_room(self, more: int, own: int) -> None:
        """Refuse `more` bytes beyond the bound; what is alone here may be as large as a body may. Raises: ApiError."""
        if self._weight > own and self._weight + more > self._limits.all_bodies_bytes:
            raise overloaded("body: expected room for it, got other requests that take it", "bodies_full")


def _closes_at_once(headers: Collection[tuple[bytes, bytes]], version: str | None) -> bool:
    """Say whether the connection ends with the answer, by a client that sends its body without waiting for a word."""
    if any(name == b"expect" for name, _ in headers):
        return False
    words = {word.strip() for name, value in headers if name == b"connection" for word in value.lower().split(b",")}
    return version == "1.0" or b"close" in words


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand out the body that was read; then what the connection says, which is only that the client has gone."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def next_message() -> Message:
        nonlocal message
        if message is not None:
            given, message = message, None
            return given
        return await receive()

    return next_message


def _in_pieces(send: Send) -> Send:
    """Send a large answer bit by bit, as its client takes it: one that takes nothing costs no copy of the whole."""

    async def send_pieces(message: Message) -> None:
        body = message.get("body", b"")
        sent = 0
        while len(body) - sent > PIECE_BYTES:
            await send({**message, "body": body[sent : sent + PIECE_BYTES], "more_body": True})
            sent += PIECE_BYTES
        await send({**message, "body": body[sent:]} if sent else message)

    return send_pieces

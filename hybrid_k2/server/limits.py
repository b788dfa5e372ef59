"""What a request's headers and body may be, checked before any of it is parsed."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid_k2.server.errors import ApiError, error_response
from hybrid_k2.server.options import Limits
from hybrid_k2.server.run import ClientGoneError


class RequestLimits:
    """Refuse a request with too many headers, a body that is too large or packed, or one that comes too slowly."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
            body = await self._read_body(receive)
        except ApiError as error:
            response = error_response(error, scope["path"], scope.get("state", {}).get("request_id", ""))
            response.headers["connection"] = "close"  # the rest of the request stays unread
            await response(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

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
            if name == b"content-length" and value.isdigit() and int(value[:20]) > self._limits.body_bytes:
                raise self._too_large(int(value[:20]))

    async def _read_body(self, receive: Receive) -> bytes:
        """Read the whole body. Raises: ApiError, ClientGoneError."""
        parts: list[bytes] = []
        size, more = 0, True
        deadline = asyncio.get_running_loop().time() + self._limits.body_s
        while more:
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except asyncio.TimeoutError:
                raise ApiError(408, f"body: expected it whole within {self._limits.body_s:g} s") from None
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limits.body_bytes:
                raise self._too_large(size)
            more = message.get("more_body", False)
        return b"".join(parts)

    def _too_large(self, size: int) -> ApiError:
        return ApiError(413, f"body: expected at most {self._limits.body_bytes} bytes, got {size} or more")


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

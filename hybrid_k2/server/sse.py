"""Server-sent events: frames of a stream, comments that keep a silent one alive, and an end when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hybrid_k2.server.errors import ApiError, error_object, is_anthropic, json_bytes, logged
from hybrid_k2.server.run import ClientGoneError, disconnected, first_of

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"


def frame(data: object, event: str = "") -> bytes:
    """Write one event; JSON has no newline of its own, so that it is one line."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + json_bytes(data) + b"\n\n"


class SseResponse(Response):
    """Stream frames until they end or the client goes; then the generator is closed and `on_end` called.

    An error in mid-stream becomes an error frame, the last one: the status has long been sent.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], on_end: Callable[[], None], keep_alive_s: float) -> None:
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # the length of an empty body
        self._frames = frames
        self._on_end = on_end  # a generator that was never asked for a frame would not notice its end
        self._keep_alive_s = keep_alive_s or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await first_of(self._stream(scope, send), disconnected(receive))
        except ClientGoneError:
            scope.setdefault("state", {}).setdefault("log", {})["client_gone"] = True
        finally:
            self._on_end()
            await self._frames.aclose()

    async def _stream(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        bug: Exception | None = None
        try:
            async for part in self._with_comments():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except ApiError as error:
            await self._send_error(error, scope, send)
        except Exception as error:
            await self._send_error(ApiError(500, "the server failed at this request"), scope, send)
            bug = error
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if bug is not None:
            raise bug  # to the log

    @staticmethod
    async def _send_error(error: ApiError, scope: Scope, send: Send) -> None:
        state = scope.setdefault("state", {})
        facts = state.setdefault("log", {})
        facts.update({**logged(error), **facts})
        anthropic = is_anthropic(scope["path"])
        data = error_object(error, anthropic, state.get("request_id", ""))
        part = frame(data, "error" if anthropic else "")
        await send({"type": "http.response.body", "body": part, "more_body": True})

    async def _with_comments(self) -> AsyncGenerator[bytes, None]:
        following = asyncio.ensure_future(anext(self._frames, None))
        try:
            while True:
                done, _ = await asyncio.wait({following}, timeout=self._keep_alive_s)
                if not done:
                    yield COMMENT
                    continue
                part = following.result()
                if part is None:
                    return
                following = asyncio.ensure_future(anext(self._frames, None))
                yield part
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

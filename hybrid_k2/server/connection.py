"""One connection of a client: HTTP as uvicorn reads it, but no client may hold it up for ever.

A request's head must come in time, and so must the rest of one that was answered before it was whole; and what the
server writes must be taken. The time of a body that somebody waits for is bounded in `limits.py`, that of an idle
connection by uvicorn. There are only so many connections at once: one more is told so and closed.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from hybrid_k2.server.errors import ApiError, error_object, json_bytes, overloaded
from hybrid_k2.server.options import Limits

log = logging.getLogger("hybrid_k2.server")


class Connection(H11Protocol):
    """Close the connection of a client that neither sends nor takes what it should."""

    def __init__(self, *arguments: Any, limits: Limits, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.logger = log  # where all that the server says goes
        self._limits = limits
        self._request_timer: asyncio.TimerHandle | None = None
        self._awaited: object = None  # the state of the client that the timer belongs to
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request, if there is room for one more connection."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self.logger.warning("a connection is refused: %d are open", self._limits.connections)
            self._refuse(overloaded("connection: expected room for it, got too many others", "too_many_connections"))
            return
        self._watch_request()

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        super().data_received(data)
        self._watch_request()

    def pause_writing(self) -> None:
        """Stop until the client has taken what was written."""
        super().pause_writing()
        self._watch_write()

    def resume_writing(self) -> None:
        """Go on."""
        _stop(self._write_timer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        _stop(self._request_timer)
        _stop(self._write_timer)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has too long a head, as every other error is answered; then close.

        uvicorn calls this where it handles h11's error.
        """
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        expected = {
            431: f"a head of at most {self._limits.header_bytes} bytes",
            501: "a body as it is or in chunks (transfer-encoding), got another coding",
        }.get(status, "valid HTTP")
        self._refuse(ApiError(status, f"request: expected {expected}"))

    def _should_upgrade(self) -> bool:
        """Go on in HTTP/1.1, whatever other protocol the client knows; uvicorn would advise to install one."""
        return False

    def _refuse(self, error: ApiError) -> None:
        """Answer with the error, unless an answer is under way, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json_bytes(error_object(error))
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                **error.headers,
            }
            for event in (
                h11.Response(status_code=error.status, headers=[*headers.items()], reason=STATUS_PHRASES[error.status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_request(self) -> None:
        """Run a clock while the client owes the head of a request, or the rest of one that has its answer.

        More bytes do not set it back.
        """
        state = self.conn.their_state
        answered = self.cycle is not None and self.cycle.response_complete
        owes = state is h11.IDLE or (state is h11.SEND_BODY and answered)
        if owes and state is self._awaited:
            return
        _stop(self._request_timer)
        self._awaited = state if owes else None
        if owes:
            limit_s = self._limits.head_s if state is h11.IDLE else self._limits.body_s
            self._request_timer = self.loop.call_later(limit_s, self.transport.abort)

    def _watch_write(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._limits.write_s, self._check_write, left)

    def _check_write(self, before: int) -> None:
        """Abort if the client took nothing since the clock began; nothing is written meanwhile."""
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._watch_write()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()

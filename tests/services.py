"""Requests to a service, for tests: collect their events, check their order, wait for their end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from hybrid_k2.engine import Reply, SamplingParams
from hybrid_k2.engine.service import Service, Ticket
from hybrid_k2.engine.service_types import Failed, Finished, Piece, Progress, ServiceEvent, ServiceRequest
from hybrid_k2.errors import HybridK2Error

TIMEOUT_S = 120  # tests may be frozen for a minute


class Client:
    """Send one request and collect what comes back."""

    def __init__(
        self,
        service: Service,
        prompt: str | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        *,
        on_event: Callable[[Client, ServiceEvent], None] | None = None,
        **request: Any,
    ) -> None:
        self.events: list[ServiceEvent] = []
        self._on_event = on_event
        self._open = request.get("n", 1)
        self._ended = threading.Event()
        full = ServiceRequest(prompt=prompt, params=params or SamplingParams(), **request)
        self.ticket: Ticket
        self._submitted = threading.Event()
        self.ticket = service.submit(full, self._take)
        self._submitted.set()

    def _take(self, event: ServiceEvent) -> None:
        assert self._open, f"{event} after the end"
        self.events.append(event)
        if isinstance(event, Failed):
            self._open = 0
        elif isinstance(event, Finished):
            self._open -= 1
        if self._on_event is not None:
            self._submitted.wait(TIMEOUT_S)
            self._on_event(self, event)
        if not self._open:
            self._ended.set()

    def wait(self) -> Client:
        assert self._ended.wait(TIMEOUT_S), "the request did not end"
        return self

    def pieces(self, choice: int = 0) -> list[Piece]:
        return [event for event in self.events if isinstance(event, Piece) and event.choice == choice]

    @property
    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]

    @property
    def error(self) -> HybridK2Error:
        (failed,) = [event for event in self.wait().events if isinstance(event, Failed)]
        return failed.error

    @property
    def replies(self) -> list[Reply]:
        """The replies, by choice."""
        finished = [event for event in self.wait().events if isinstance(event, Finished)]
        for one in finished:
            text = "".join(piece.event.text for piece in self.pieces(one.choice) if piece.event.kind == "content")
            assert text == one.reply.content
        return [one.reply for one in sorted(finished, key=lambda one: one.choice)]

    @property
    def reply(self) -> Reply:
        (reply,) = self.replies
        return reply

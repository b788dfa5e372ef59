"""Requests to a service, for tests: collect their events, check their order, wait for their end."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

from hybrid_k2.engine import Engine, Reply, SamplingParams
from hybrid_k2.engine.service import Service, Ticket
from hybrid_k2.engine.service_types import (
    Failed,
    Finished,
    Piece,
    Progress,
    ServiceEvent,
    ServiceOptions,
    ServiceRequest,
)
from hybrid_k2.errors import HybridK2Error
from tests.engines import generated

CHUNK, PAGES = 48, 10
ODD = 501  # a token that no prompt has by chance, and no reply
# Log probabilities show a logit that differs in its last bit.
PARAMS = SamplingParams(
    temperature=3.0, top_p=1.0, seed=0, max_tokens=12, ignore_eos=True, logprobs=3, logit_bias={ODD: -100.0}
)
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


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> Reply:
    """Compute a reply with nothing in the cache and nobody else there."""
    engine._prefix.release()
    return generated(engine, prompt, params)


def same(reply: Reply, expected: Reply) -> bool:
    assert expected.logprobs is not None
    return (reply.token_ids, reply.logprobs, reply.prompt_logprobs, reply.content, reply.finish_reason) == (
        expected.token_ids,
        expected.logprobs,
        expected.prompt_logprobs,
        expected.content,
        expected.finish_reason,
    )


def random_ids(chance: random.Random, length: int) -> list[int]:
    return [chance.randrange(500) for _ in range(length)]


def serve(engine: Engine, **options: Any) -> Service:
    return Service(engine, ServiceOptions(**options))

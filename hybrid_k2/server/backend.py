"""What stands behind the routes: a model that is loading, one that serves, or none any more."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hybrid_k2.experts.usage import ExpertUse
from hybrid_k2.placement import Plan
from hybrid_k2.protocol import ImageFormat, Tokenizer
from hybrid_k2.server.errors import loading, shutting_down

if TYPE_CHECKING:
    from hybrid_k2.engine.service import Service


class Model(Protocol):
    """What the routes need to know of the engine; `hybrid_k2.engine.Engine` is one."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def images(self) -> ImageFormat | None:
        """How the model wants its images; None for one that reads text only."""
        ...

    @property
    def context_tokens(self) -> int:
        """The longest prompt and reply together."""
        ...

    @property
    def plan(self) -> Plan:
        """Where everything lies."""
        ...

    def expert_use(self) -> dict[int, ExpertUse]:
        """Return how often each expert was chosen, by MoE layer; any thread may ask."""
        ...

    def close(self) -> None:
        """Free the weights."""
        ...


@dataclass(frozen=True)
class Served:
    """A loaded model and the service that runs it."""

    model: Model
    service: Service

    def close(self) -> None:
        """End what still runs, and free everything, whatever one of them raises."""
        try:
            self.service.close()
        finally:
            self.model.close()


class Backend:
    """Hold the state of the server: loading, ready, then draining. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._served: Served | None = None
        self._draining = False
        self._read_bytes = self._total_bytes = 0

    @property
    def state(self) -> str:
        """One of loading, ready, failing (no step of the engine works) and draining."""
        with self._lock:
            if self._draining:
                return "draining"
            if self._served is None:
                return "loading"
        return "ready" if self._served.service.stats().healthy else "failing"

    @property
    def draining(self) -> bool:
        """Whether the server is about to end."""
        with self._lock:
            return self._draining

    @property
    def loading_progress(self) -> tuple[int, int]:
        """The bytes of weights that are read, and the bytes to read; 0 before that is known."""
        with self._lock:
            return self._read_bytes, self._total_bytes

    @property
    def served(self) -> Served | None:
        """The loaded model, also while draining; None before."""
        return self._served

    def report_loading(self, read_bytes: int, total_bytes: int) -> None:
        """Take note of how far the loading is."""
        with self._lock:
            self._read_bytes, self._total_bytes = read_bytes, total_bytes

    def serve(self, served: Served) -> None:
        """Begin to answer requests."""
        with self._lock:
            self._served = served

    def drain(self) -> None:
        """Take no new requests from now on."""
        with self._lock:
            self._draining = True

    def ready(self) -> Served:
        """Return the model and its service. Raises: ApiError 503 while it loads or drains."""
        with self._lock:
            if self._draining:
                raise shutting_down()
            if self._served is None:
                raise loading()
            return self._served

"""What a server asks of an engine that serves many requests at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.reply import Reply
from hybrid_k2.errors import HybridK2Error, RequestError
from hybrid_k2.protocol import Event


class QueueFullError(RequestError):
    """Too many requests wait, in all or of one key."""

    def __init__(self, message: str, *, reason: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class ServiceRequest:
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking: bool = True
    preserve_thinking: bool = False
    params: SamplingParams = field(default_factory=SamplingParams)
    key: str = ""
    n: int = 1


@dataclass(frozen=True)
class Progress:
    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Piece:
    choice: int
    event: Event
    tokens: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Finished:
    choice: int
    reply: Reply


@dataclass(frozen=True)
class Failed:
    error: HybridK2Error


ServiceEvent = Progress | Piece | Finished | Failed


class Ticket(Protocol):
    id: str
    prompt_tokens: int

    def cancel(self) -> None: ...


@dataclass
class ServiceStats:
    running: int = 0
    waiting: int = 0
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    prefix_queries_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    started_at: float = 0.0


class Service(Protocol):
    def submit(self, request: ServiceRequest, on_event: Callable[[ServiceEvent], None]) -> Ticket: ...

    def stats(self) -> ServiceStats: ...

    def drain(self, timeout_s: float) -> bool: ...

    def close(self) -> None: ...

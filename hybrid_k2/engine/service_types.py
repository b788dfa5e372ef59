"""What goes into a service and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.prefix_file import check_prefix_file
from hybrid_k2.engine.reply import Reply, TokenLogprob
from hybrid_k2.errors import ConfigError, EngineError, HybridK2Error, RequestError, shown
from hybrid_k2.placement import Plan
from hybrid_k2.placement.budget import find_budget
from hybrid_k2.placement.memories import HOST
from hybrid_k2.placement.sizes import format_bytes
from hybrid_k2.protocol import Event

MAX_CHOICES = 16


class QueueFullError(RequestError):
    """There is no place in the queue; the same request may be accepted later."""

    def __init__(self, message: str, *, retry_after_s: float, reason: str, hint: str | None = None) -> None:
        """Take the message, after how long to try again, and whose limit it is: "queue", or the request's "key"."""
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s
        self.reason = reason


class ServiceClosingError(EngineError):
    """The service takes no more requests: it is shutting down."""


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Bound what a service takes on; None: as many as the other limit allows.

    Raises: ConfigError naming the field and its range.
    """

    max_running: int = 16  # sequences that are computed together
    max_running_per_key: int | None = None
    max_waiting: int = 256  # requests that have not begun
    max_waiting_per_key: int | None = None
    step_tokens: int | None = None  # computed at once: less lets replies go on faster beside a prompt; None: a chunk
    cache_ram_bytes: int = 0  # host memory for latents that no page of the KV cache is left for
    cache_path: Path | None = None  # latents are saved there when the service closes, and read when it starts

    def __post_init__(self) -> None:
        for name, low in (
            ("max_running", 1),
            ("max_running_per_key", 1),
            ("max_waiting", 0),
            ("max_waiting_per_key", 0),
            ("step_tokens", 1),
            ("cache_ram_bytes", 0),
        ):
            value = getattr(self, name)
            optional = name.endswith("_per_key") or name == "step_tokens"
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}: expected an integer of at least {low}, got {shown(value)}")
        if self.cache_path is not None and not self.cache_ram_bytes:
            raise ConfigError(
                "cache_path: expected cache_ram_bytes above 0 with it, got 0",
                hint="what is read from the file goes to that memory",
            )

    def check(self, plan: Plan) -> None:
        """Make sure that the options suit a plan, and that the cache file can be written, before weights are loaded.

        Raises: ConfigError.
        """
        if (self.step_tokens or 0) > plan.chunk_tokens:
            raise ConfigError(
                f"step_tokens: expected at most {plan.chunk_tokens} (chunk_tokens of the plan), got {self.step_tokens}",
                hint="give prefill more chunk_tokens in the placement rules",
            )
        left = find_budget(HOST, plan.rules, plan.machine).nbytes - plan.bytes_on(HOST)
        if self.cache_ram_bytes > left:
            raise ConfigError(
                f"cache_ram_bytes: expected at most the {format_bytes(left)} that the plan leaves on the host, "
                f"got {format_bytes(self.cache_ram_bytes)}",
            )
        if self.cache_path is not None:
            check_prefix_file(self.cache_path)


@dataclass(frozen=True, kw_only=True)
class ServiceRequest:
    """Ask for `n` replies to `messages` or to a `prompt`; see `Engine.generate` for these.

    `key`: whose request it is, for the limits and the fair queue. `cache_salt`: it reuses latents of requests with the
    same salt alone, so that nobody can tell from the time of a reply what others asked. Choice i of a request with a
    seed has seed + i.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking: bool = True
    preserve_thinking: bool = False
    params: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    key: str = ""
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or not 1 <= self.n <= MAX_CHOICES:
            raise RequestError(f"n: expected an integer from 1 to {MAX_CHOICES}, got {shown(self.n)}")


@dataclass(frozen=True)
class Progress:
    """Say how many tokens of the prompt are done; the cached ones count. The first comes when the request begins."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Piece:
    """Bring an event of a choice; `tokens`: those computed since its last piece, if the request asks for logprobs."""

    choice: int
    event: Event
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """End a choice. Tokens that led to no event are in `reply.logprobs` alone."""

    choice: int
    reply: Reply


@dataclass(frozen=True)
class Failed:
    """End a request, all its choices: what had been sent stands, and nothing follows."""

    error: HybridK2Error


ServiceEvent = Progress | Piece | Finished | Failed


@dataclass(frozen=True, kw_only=True)
class ServiceStats:
    """Count what a service does and did, since its start where nothing else is said."""

    started_at: float  # seconds since 1970
    kv_pages_total: int
    kv_pages_used: int = 0  # by sequences, now
    kv_pages_kept: int = 0  # with latents that a prompt may reuse, now; a page may be both
    ram_pages_kept: int = 0  # of the second level, now
    running: int = 0  # sequences, now
    waiting: int = 0  # requests that have not begun, now
    requests: int = 0  # accepted
    rejected: int = 0  # for want of a place in the queue
    finished: int = 0  # choices with a reply, the cancelled ones included
    cancelled: int = 0
    failed: int = 0  # requests
    prefix_queries_tokens: int = 0  # of prompts that began
    prefix_hit_tokens: int = 0  # of these: reused
    prompt_tokens: int = 0  # computed
    generated_tokens: int = 0
    preemptions: int = 0  # sequences that gave up their pages, to compute them again
    steps: int = 0
    failed_steps: int = 0  # some requests may have been served nevertheless
    step_s: float = 0.0  # of the last step
    step_prompt_tokens: int = 0
    step_sequences: int = 0
    healthy: bool = True  # whether anything worked in the last step

"""What `/stats` shows: the model, where it lies, and the tokens and speed of this chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hybrid_k2.placement.sizes import format_bytes

if TYPE_CHECKING:
    from hybrid_k2.engine import Engine, Reply


class Statistics:
    """Sums over the replies of a chat."""

    def __init__(self) -> None:
        self._replies = 0
        self._read = self._reused = self._written = 0
        self._prefill_s = self._decode_s = 0.0
        self._context = 0

    def add(self, reply: Reply) -> None:
        """Count one reply."""
        usage, timings = reply.usage, reply.timings
        self._replies += 1
        self._read += usage.prompt_tokens - usage.cached_tokens
        self._reused += usage.cached_tokens
        self._written += usage.completion_tokens
        self._prefill_s += timings.prefill_s
        self._decode_s += timings.decode_s
        self._context = usage.prompt_tokens + usage.completion_tokens

    def lines(self, engine: Engine, model: str) -> Iterator[tuple[str, str]]:
        """Return the figures, each with its name."""
        plan = engine.plan
        yield "model", f"{model} ({plan.config.model_type}, {plan.config.num_hidden_layers} layers)"
        yield "rules", plan.rules.source
        for device in plan.devices:
            yield device, f"{format_bytes(plan.bytes_on(device))} planned"
        yield "experts", f"{engine.experts_name}, {plan.threads} thread{'s' * (plan.threads > 1)}"
        yield "memory", f"{engine.read_gbps:.1f} GB/s read; {format_bytes(plan.bytes_per_token)} per decoded token"
        yield "context", f"{self._context} of {plan.kv_cache.tokens} tokens after the last reply"
        yield "replies", str(self._replies)
        yield "prefill", f"{self._read} tokens in {self._prefill_s:.1f} s, {self._reused} more reused"
        yield "decode", f"{self._written} tokens in {self._decode_s:.1f} s"

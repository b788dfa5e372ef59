"""What `/stats` shows: the model, where it lies, and the tokens and speed of this chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hybrid_k2.cli.chat.backend import Backend

if TYPE_CHECKING:
    from hybrid_k2.engine import Reply


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
        self._context = usage.prompt_tokens + usage.completion_tokens or self._context

    def lines(self, backend: Backend) -> Iterator[tuple[str, str]]:
        """Return the figures, each with its name."""
        yield from backend.facts()
        limit = backend.context_tokens
        yield "context", f"{self._context}{'' if limit is None else f' of {limit}'} tokens after the last reply"
        yield "replies", str(self._replies)
        yield "prefill", f"{self._read} tokens in {self._prefill_s:.1f} s, {self._reused} more reused"
        yield "decode", f"{self._written} tokens in {self._decode_s:.1f} s"

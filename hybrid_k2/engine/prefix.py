"""Keep the latents of the last sequence, so that the next turn of a conversation computes only what is new."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.model.latent_cache import LatentCache


class KeptPrefix:
    """Own the pages of the sequence that ran last."""

    def __init__(self, cache: LatentCache, chunk_tokens: int) -> None:
        self._cache = cache
        self._chunk_tokens = chunk_tokens
        self._tokens: list[int] = []
        self._pages: list[int] = []
        self._repeatable = 0

    def lend(self, sequence: TokenSequence) -> None:
        """Give a new sequence the pages of the longest common prefix, and free the others.

        At least one token of the prompt is left to be computed: its logits are wanted. A sequence with a seed of its
        own gets only latents that computing them again would give bit for bit, so that its text repeats.
        """
        common = _common_prefix(self._tokens, sequence.tokens[:-1])
        repeatable = min(common, self._repeatable) // self._chunk_tokens * self._chunk_tokens
        reused = common if sequence.params.seed is None else repeatable
        pages = self._cache.pages_for(reused)
        sequence.pages = self._pages[:pages]
        sequence.cached = sequence.cached_at_start = reused
        sequence.repeatable = repeatable
        self._cache.pool.free(self._pages[pages:])
        self._forget()

    def keep(self, sequence: TokenSequence) -> None:
        """Take over the pages of a sequence that is done or was broken off."""
        self.release()
        pages = self._cache.pages_for(sequence.cached)
        self._cache.pool.free(sequence.pages[pages:])
        self._tokens = sequence.tokens[: sequence.cached]
        self._pages = sequence.pages[:pages]
        self._repeatable = sequence.repeatable
        sequence.pages = []

    def release(self) -> None:
        """Free all pages."""
        self._cache.pool.free(self._pages)
        self._forget()

    def _forget(self) -> None:
        self._tokens, self._pages, self._repeatable = [], [], 0


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    shorter = min(len(left), len(right))
    return next((place for place in range(shorter) if left[place] != right[place]), shorter)

"""Log probabilities of the tokens of a reply, beside the likeliest alternatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hybrid_k2.engine.reply import TokenLogprob, TopLogprob
from hybrid_k2.protocol import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


class LogprobReader:
    """Read log probabilities from logits: the model's own, before any bias, penalty, temperature, cut or grammar."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        """`top`: how many of the likeliest tokens are given beside the chosen one."""
        self._tokenizer = tokenizer
        self._top = top

    def read(self, logits: Tensor, token: int) -> TokenLogprob:
        """Give the chosen token's log probability and those of the likeliest; equal ones in the order of their ids.

        Shapes: logits: [V], any float dtype, any device; finite, or -inf.
        """
        values = log_softmax(logits.detach().double().cpu().numpy())
        top = tuple(self._named(int(best), values) for best in _highest(values, self._top))
        chosen = self._named(token, values)
        return TokenLogprob(chosen.token_id, chosen.text_bytes, chosen.logprob, top)

    def _named(self, token: int, values: NDArray[np.float64]) -> TopLogprob:
        known = token < self._tokenizer.vocab_size
        text = self._tokenizer.token_bytes(token) if known else b""
        return TopLogprob(token, text, max(float(values[token]), LOWEST))


def log_softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the log probabilities of logits. Shapes: [V] -> [V]."""
    shifted: NDArray[np.float64] = values - values.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def _highest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` highest values, the highest first, of equal ones the first."""
    count = min(count, len(values))
    if not count:
        return np.empty(0, np.int64)
    candidates = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]

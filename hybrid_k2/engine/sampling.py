"""Choose the next token from the logits: bias, penalties, mask, temperature, min-p, top-k, top-p, one draw.

Everything here is a threshold on values, never an order of tokens, so tokens with equal logits share one fate and the
result does not depend on how a sort breaks ties. A choice over K2.6's 163,840 tokens takes 0.5 to 1 ms on one core, and
about 2 ms when nearly all tokens are equally likely (bench/sampler.py; Zen 3, numpy 2.4).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.errors import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Logits = NDArray[np.float32]


_SMALLEST = 16.0**-8  # below this share of the likeliest token, the bands of top-p are one
_BLOCK = 512  # about the square root of the vocabulary: as many blocks as tokens in one
_FEW = 4096  # so many numbers are sorted and added up faster than they are divided into bands or blocks


class NotFiniteError(EngineError):
    """The model gave logits that are not finite: what it computed is not to be used again."""


class Sampler:
    """Choose the tokens of one request, with its own random numbers and its own penalty counts.

    The random numbers are PCG64's raw output, one per token that is drawn, so that they depend on `seed` alone.
    `params` must be complete (see `SamplingParams.over`).
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt_ids: Sequence[int] = ()) -> None:
        self.seed = secrets.randbits(63) if params.seed is None else int(params.seed)
        self._random = np.random.PCG64(self.seed % 2**64)
        self._temperature = _stated(params, "temperature")
        self._min_p = _stated(params, "min_p")
        self._top_k = int(_stated(params, "top_k"))
        self._top_p = _stated(params, "top_p")
        self._repetition = np.float32(_stated(params, "repetition_penalty"))
        self._frequency = np.float32(_stated(params, "frequency_penalty"))
        self._presence = np.float32(_stated(params, "presence_penalty"))
        self._penalised = bool(self._repetition != 1 or self._frequency or self._presence)
        self._bias_ids = np.array(list(params.logit_bias.keys()), np.int64)
        self._bias = np.array(list(params.logit_bias.values()), np.float32)
        self._prompt_ids = prompt_ids
        self._vocab_size = vocab_size

    @cached_property
    def _scratch(self) -> Logits:
        """Where values are changed; of a request that waits it takes no memory yet."""
        return np.empty(self._vocab_size, np.float32)

    @cached_property
    def _counts(self) -> Logits:
        """How often the reply has each token."""
        return np.zeros(self._vocab_size, np.float32)

    @cached_property
    def _seen(self) -> NDArray[np.bool_]:
        """Which tokens are in the prompt or in the reply."""
        seen = np.zeros(self._vocab_size, np.bool_)
        seen[np.array(self._prompt_ids, np.int64)] = True
        return seen

    def sample(self, logits: Tensor, allowed: NDArray[np.bool_] | None = None) -> int:
        """Choose one token and count it; only an allowed one, if `allowed` is given.

        Shapes: logits: [V], any float dtype, any device; not changed. allowed: [V].
        Raises: NotFiniteError; EngineError when no allowed token has any probability.
        """
        values: Logits = logits.detach().float().cpu().numpy()
        values = self._shifted(values)
        _check_finite(values)
        if allowed is not None:
            values = np.where(allowed, values, np.float32(-np.inf))
            if values.max() == -np.inf:
                raise EngineError("logits: expected a finite value, got -inf for every token that may come")
        token = self._draw(values) if self._temperature else int(values.argmax())
        if self._penalised:
            self._counts[token] += 1
            self._seen[token] = True
        return token

    def _shifted(self, values: Logits) -> Logits:
        if not self._penalised and not len(self._bias):
            return values
        np.copyto(self._scratch, values)
        values = self._scratch
        values[self._bias_ids] += self._bias
        if self._penalised:
            seen = np.flatnonzero(self._seen)
            counts, before = self._counts[seen], values[seen]
            after = np.where(before > 0, before / self._repetition, before * self._repetition)
            values[seen] = after - self._frequency * counts - self._presence * (counts > 0)
        return values

    def _draw(self, values: Logits) -> int:
        weights = likely_weights(values, self._temperature, self._min_p, self._top_k, self._top_p, self._scratch)
        uniform = (self._random.random_raw() >> 11) * 2.0**-53  # 53 random bits, in [0, 1)
        return _first_beyond(weights, uniform * float(weights.sum(dtype=np.float64)), "right")


def likely_weights(
    values: Logits, temperature: float, min_p: float, top_k: int, top_p: float, out: Logits | None = None
) -> Logits:
    """Give each token's probability relative to the most likely one, and 0 to those that may not be drawn.

    Shapes: values: [V] -> [V], in `out` if it is given (fresh memory costs more than the arithmetic).
    """
    weights: Logits = np.subtract(values, values.max(), out=out)
    with np.errstate(over="ignore"):  # at tiny temperatures the unlikely tokens go to -inf, as they should
        weights /= np.float32(max(temperature, np.finfo(np.float32).tiny))
    np.exp(weights, out=weights)
    if min_p > 0:
        _drop_below(weights, min_p)
    if 0 < top_k < len(weights):
        _drop_below(weights, float(np.partition(weights, -top_k)[-top_k]))
    if top_p < 1:
        _drop_below(weights, _top_p_floor(weights, top_p))
    return weights


def _drop_below(weights: Logits, floor: float) -> None:
    weights *= weights >= floor


def _top_p_floor(weights: Logits, top_p: float) -> float:
    """Give the smallest weight among the likeliest tokens that together hold the share `top_p`.

    Goes down in bands of a factor 16 and sorts only the band in which the share is reached: sorting is what costs.
    """
    missing = top_p * float(weights.sum(dtype=np.float64))
    ceiling, floor = np.inf, 0.0 if len(weights) <= _FEW else 1 / 16
    while True:
        band = weights[(weights >= floor) & (weights < ceiling)]
        mass = float(band.sum(dtype=np.float64))
        if mass >= missing or floor == 0:
            break
        missing -= mass
        ceiling, floor = floor, floor / 16 if floor > _SMALLEST else 0.0
    band.sort()
    return float(band[::-1][_first_beyond(band[::-1], missing, "left")]) if len(band) else ceiling


def _first_beyond(weights: Logits, target: float, side: Literal["left", "right"]) -> int:
    """Return the first index where the running sum reaches `target` ("left") or exceeds it ("right").

    Blocks first, then inside one block: a running sum over the whole vocabulary costs ten times as much. Rounding may
    leave every sum below the target; then it is the last index that adds anything.
    """
    if len(weights) <= _FEW:
        return _first_index(np.cumsum(weights, dtype=np.float64), target, side)
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    block = _first_index(sums, target, side)
    start = block * _BLOCK
    before = sums[block - 1] if block else 0.0
    running = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    return start + _first_index(running, target - before, side)


def _first_index(running: NDArray[np.float64], target: float, side: Literal["left", "right"]) -> int:
    return int(min(np.searchsorted(running, target, side), np.searchsorted(running, running[-1])))


def _stated(params: SamplingParams, name: str) -> float:
    value = getattr(params, name)
    if value is None:
        raise TypeError(f"{name}: expected a value, got None; complete the params with SamplingParams.over")
    return float(value)


def _check_finite(values: Logits) -> None:
    highest = values.max()  # NaN wins over every number
    if np.isfinite(highest):
        return
    if highest == -np.inf:
        raise NotFiniteError("logits: expected at least one finite value, got -inf for every token")
    token = int(values.argmax())
    raise NotFiniteError(
        f"logits: expected finite values, got {highest} for token {token}",
        hint="the checkpoint is damaged, or a number overflowed; try rules/reference.yaml",
    )

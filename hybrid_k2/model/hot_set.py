"""Keep those experts on the accelerator that are used most: one leaves, another comes, while the model computes.

An exchange is decided by the counts before a step, copied in the background, and made a fixed number of steps later,
between two of them. So which experts are hot in which step depends on what was computed, and not on any timing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from hybrid_k2.accelerator import HotExperts, Label, Trace
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.experts.l32 import L32Expert
from hybrid_k2.experts.usage import LayerUsage
from hybrid_k2.model.schedule import Operation

log = logging.getLogger("hybrid_k2")

LOOK_TOKENS = 256  # between two looks at the counts, once they agree with what is hot
COPY_STEPS = 4  # of the model, while an exchange is copied: 25 MB each way at the size of K2.6, some ms
COPY_S = 60.0  # no copy takes as long
KEPT_CHOICES = 1 << 20  # of a layer; where there are twice as many, all counts are halved
SURE = 3.0  # standard deviations


@dataclass(frozen=True)
class HotLayer:
    """Hold what an exchange in one layer concerns; `also_on_host`: the host keeps the hot experts, too."""

    hot: HotExperts
    host: NativeExperts
    usage: LayerUsage
    also_on_host: bool = False


@dataclass(frozen=True)
class Exchange:
    """Let one expert of a layer leave the accelerator, and another one come."""

    layer: int
    leaves: int
    comes: int


class HotSet:
    """Watch the counts of all layers that have hot experts, and exchange one expert at a time.

    `trace`, if it is set, gets the times of copies and exchanges.
    Effects: starts a thread for the first copy.
    """

    trace: Trace | None = None

    def __init__(self, layers: Mapping[int, HotLayer], look_tokens: int = LOOK_TOKENS) -> None:
        self._layers = dict(layers)
        self._look_tokens = look_tokens
        self._copier = ThreadPoolExecutor(1, "hot-experts")
        self._until_look = look_tokens  # tokens
        self._pending: tuple[Exchange, Future[L32Expert | None]] | None = None
        self._steps_left = 0

    def between_steps(self, tokens: int) -> Iterator[Operation]:
        """Say what is to be done before a step of so many tokens: an exchange that is due, or nothing.

        To be called before every step, when none runs; it may start the copy of an exchange that is due later.
        """
        self._until_look -= tokens
        if self._pending is not None:
            self._steps_left -= 1
            if self._steps_left <= 0:
                exchange, copied = self._pending
                yield partial(self._make, exchange, copied), Label("exchange", exchange.layer)
        elif self._until_look <= 0:
            self._look()

    def close(self) -> None:
        """Wait for the copy that runs, and end."""
        self._copier.shutdown(wait=True, cancel_futures=True)

    def _look(self) -> None:
        counts = {layer: part.usage.counts() for layer, part in self._layers.items()}
        hot = {layer: part.hot.experts for layer, part in self._layers.items()}
        exchange = best_exchange(counts, hot)
        if exchange is not None:
            self._pending = exchange, self._copier.submit(self._copy, exchange)
            self._steps_left = COPY_STEPS
            return
        self._until_look = self._look_tokens
        if any(sum(layer) > 2 * KEPT_CHOICES for layer in counts.values()):
            for part in self._layers.values():
                part.usage.fade()

    def _copy(self, exchange: Exchange) -> L32Expert | None:
        """Bring what comes near the accelerator; return what leaves, unless the host has it."""
        part, start = self._layers[exchange.layer], time.monotonic_ns()
        leaves = None
        if not part.also_on_host:
            leaves = part.hot.copy(exchange.leaves)
            part.host.check_copy(exchange.leaves, leaves)
        part.hot.bring(exchange.comes, part.host.copy_expert(exchange.comes))
        if self.trace is not None:
            self.trace.add(Label("hot", exchange.layer, lane="copies"), start, time.monotonic_ns())
        return leaves

    def _make(self, exchange: Exchange, copied: Future[L32Expert | None]) -> None:
        """Make the exchange, on the accelerator's lane; where the copy failed, all stays as it was."""
        try:
            leaves = copied.result(COPY_S)
        except Exception as error:
            log.warning("layer %d: expert %d does not become a hot one: %s", exchange.layer, exchange.comes, error)
        else:
            part = self._layers[exchange.layer]
            part.hot.exchange(exchange.leaves, exchange.comes)
            if leaves is not None:
                part.host.replace_expert(exchange.comes, exchange.leaves, leaves)
        self._until_look = 0 if copied.done() and copied.exception() is None else self._look_tokens
        self._pending = None


def best_exchange(counts: Mapping[int, list[int]], hot: Mapping[int, Collection[int]]) -> Exchange | None:
    """Return the exchange that gains most, if it is more than chance: counts of equal experts differ, too.

    counts: layer -> how often each expert was chosen. hot: layer -> its hot experts.
    """
    best, most = None, 0
    for layer, chosen in counts.items():
        cold = [expert for expert in range(len(chosen)) if expert not in hot[layer]]
        if not cold or not hot[layer]:
            continue
        leaves = min(sorted(hot[layer]), key=lambda expert: chosen[expert])
        comes = max(cold, key=lambda expert: chosen[expert])
        gain = chosen[comes] - chosen[leaves]
        if gain > most and gain > SURE * (chosen[comes] + chosen[leaves]) ** 0.5:
            best, most = Exchange(layer, leaves, comes), gain
    return best

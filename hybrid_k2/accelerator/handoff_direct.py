"""No hand-off: the experts compute while `take` waits, on the calling thread's time."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from hybrid_k2.accelerator.base import Handoff, Label
from hybrid_k2.accelerator.slots import Slots, TimeLimit
from hybrid_k2.experts import ExpertsBackend


class DirectHandoff(Handoff):
    """Call the experts when their result is taken.

    For a host where the accelerator's part and the experts want the same cores: side by side they would only take
    turns, and a result is written straight into the caller's memory.
    """

    concurrent = False

    def __init__(self, layers: Mapping[int, ExpertsBackend]) -> None:
        self._layers = dict(layers)
        self._slots = Slots(layers, TimeLimit(float("inf")))  # nothing beside the calling thread could watch it
        self._arguments: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by slot

    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See Handoff; the arguments are kept, not copied: nothing changes them before they are taken."""
        with self._slots.posting(slot, layer, len(hidden)):
            self._arguments[slot] = hidden.cpu(), ids.cpu(), weights.cpu()

    def take(self, slot: int, layer: int) -> Tensor:
        """See Handoff."""
        with self._slots.taking(slot, layer):
            start = time.monotonic_ns()
            try:
                result = self._layers[layer].forward(*self._arguments[slot])
            finally:
                if self.trace is not None:
                    self.trace.add(Label("experts", layer, slot, "experts"), start, time.monotonic_ns())
        del self._arguments[slot]
        return result

    def reset(self) -> None:
        """See Handoff; nothing runs."""
        for slot, _ in self._slots.filled():
            self._slots.free(slot)
        self._arguments.clear()

    def close(self) -> None:
        """See Handoff."""
        self._slots.close()
        self._layers.clear()
        self._arguments.clear()

"""The hand-off by `submit` and `wait`, to the experts of any backend."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from hybrid_k2.accelerator.base import Handoff, Label
from hybrid_k2.accelerator.slots import MINUTE, Slots, TimeLimit, named
from hybrid_k2.accelerator.trace import WAITS
from hybrid_k2.experts import ExpertsBackend


class SubmitHandoff(Handoff):
    """Submit each batch to the backend of its layer; a tensor of another device is copied to the host.

    `limit` is how long `take` and `reset` wait for a computation.
    """

    def __init__(self, layers: Mapping[int, ExpertsBackend], limit: TimeLimit = MINUTE) -> None:
        self._layers = dict(layers)
        self._slots = Slots(layers, limit)

    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See Handoff."""
        with self._slots.posting(slot, layer, len(hidden)):
            self._layers[layer].submit(slot, hidden.cpu(), ids.cpu(), weights.cpu())

    def take(self, slot: int, layer: int) -> Tensor:
        """See Handoff."""
        with self._slots.taking(slot, layer) as posted:
            backend, start = self._layers[layer], time.monotonic_ns()
            try:
                result = backend.wait(slot, posted.limit_s)
            finally:
                if self.trace is not None:
                    self.trace.add(Label("wait", layer, slot, WAITS), start, time.monotonic_ns())
            if self.trace is not None and (times := backend.computed(slot)) is not None:
                self.trace.add(Label("experts", layer, slot, "experts"), *times)
            return result

    def reset(self) -> None:
        """See Handoff."""
        for slot, posted in self._slots.filled():
            with named(posted.layer):
                self._layers[posted.layer].abandon(slot, posted.limit_s)
            self._slots.free(slot)

    def close(self) -> None:
        """See Handoff."""
        self._slots.close()

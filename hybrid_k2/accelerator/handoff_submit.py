"""The hand-off by `submit` and `wait`, to the experts of any backend."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from hybrid_k2.accelerator.base import Handoff, Label
from hybrid_k2.accelerator.trace import WAITS
from hybrid_k2.errors import EngineError
from hybrid_k2.experts import ExpertsBackend


class SubmitHandoff(Handoff):
    """Submit each batch to the backend of its layer; a tensor of another device is copied to the host.

    `timeout_s` is how long `take` and `reset` wait for a computation. When the experts computed is not known, so that
    their lane of the trace stays empty.
    """

    def __init__(self, layers: Mapping[int, ExpertsBackend], timeout_s: float = 60.0) -> None:
        self._layers = dict(layers)
        self._timeout_s = timeout_s
        self._posted: dict[int, int] = {}  # slot -> layer

    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See Handoff."""
        if slot in self._posted:
            raise ValueError(f"slot {slot}: expected a free one, got one that holds layer {self._posted[slot]}")
        backend = self._backend(layer)
        self._posted[slot] = layer  # before it is submitted: an interrupt may come in between
        try:
            backend.submit(slot, hidden.cpu(), ids.cpu(), weights.cpu())
        except EngineError as error:
            del self._posted[slot]
            raise EngineError(f"layer {layer}: {error.message}", hint=error.hint) from error
        except Exception:
            del self._posted[slot]
            raise

    def take(self, slot: int, layer: int) -> Tensor:
        """See Handoff."""
        if self._posted.get(slot) != layer:
            held = f"layer {self._posted[slot]}" if slot in self._posted else "nothing"
            raise ValueError(f"slot {slot}: expected it to hold layer {layer}, got {held}")
        start = time.monotonic_ns()
        try:
            result = self._backend(layer).wait(slot, self._timeout_s)
        except EngineError as error:
            raise EngineError(f"layer {layer}: {error.message}", hint=error.hint) from error
        finally:
            if self.trace is not None:
                self.trace.add(Label("wait", layer, slot, WAITS), start, time.monotonic_ns())
        del self._posted[slot]
        return result

    def reset(self) -> None:
        """See Handoff."""
        for slot, layer in list(self._posted.items()):
            try:
                self._backend(layer).abandon(slot, self._timeout_s)
            except EngineError as error:
                raise EngineError(f"layer {layer}: {error.message}", hint=error.hint) from error
            del self._posted[slot]

    def close(self) -> None:
        """See Handoff."""
        self._layers.clear()

    def _backend(self, layer: int) -> ExpertsBackend:
        if layer not in self._layers:
            raise EngineError(f"layer {layer}: expected a layer of an open hand-off, got one without experts")
        return self._layers[layer]

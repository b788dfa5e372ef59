"""No hand-off: the experts compute while `take` waits, on the calling thread's time."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from hybrid_k2.accelerator.base import Handoff, Label
from hybrid_k2.errors import EngineError
from hybrid_k2.experts import ExpertsBackend

Arguments = tuple[Tensor, Tensor, Tensor]


class DirectHandoff(Handoff):
    """Call the experts when their result is taken.

    For a host where the accelerator's part and the experts want the same cores: side by side they would only take
    turns, and a result is written straight into the caller's memory.
    """

    def __init__(self, layers: Mapping[int, ExpertsBackend]) -> None:
        self._layers = dict(layers)
        self._posted: dict[int, tuple[int, Arguments]] = {}  # slot -> layer, arguments

    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See Handoff; the arguments are kept, not copied: nothing changes them before they are taken."""
        if slot in self._posted:
            raise ValueError(f"slot {slot}: expected a free one, got one that holds layer {self._posted[slot][0]}")
        if layer not in self._layers:
            raise EngineError(f"layer {layer}: expected a layer of an open hand-off, got one without experts")
        self._posted[slot] = layer, (hidden.cpu(), ids.cpu(), weights.cpu())

    def take(self, slot: int, layer: int) -> Tensor:
        """See Handoff."""
        held, arguments = self._posted.get(slot, (None, None))
        if held != layer or arguments is None:
            text = "nothing" if held is None else f"layer {held}"
            raise ValueError(f"slot {slot}: expected it to hold layer {layer}, got {text}")
        start = time.monotonic_ns()
        try:
            result = self._layers[layer].forward(*arguments)
        except EngineError as error:
            raise EngineError(f"layer {layer}: {error.message}", hint=error.hint) from error
        finally:
            if self.trace is not None:
                self.trace.add(Label("experts", layer, slot, "experts"), start, time.monotonic_ns())
        del self._posted[slot]
        return result

    def reset(self) -> None:
        """See Handoff; nothing runs."""
        self._posted.clear()

    def close(self) -> None:
        """See Handoff."""
        self._layers.clear()
        self._posted.clear()

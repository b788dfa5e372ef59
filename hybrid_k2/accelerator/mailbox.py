"""The hand-off through a block of host memory, to the native experts: what a GPU's kernels do, done by a thread.

The protocol is at the top of csrc/handoff/mailbox.h. A thread of the extension serves the block: it watches the flags
of both slots, starts the experts, which read and write the block in place, and publishes their replies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hybrid_k2.accelerator.base import Handoff, Label
from hybrid_k2.accelerator.trace import WAITS
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.base import SLOTS, check_slot
from hybrid_k2.experts.cpu import NativeExperts, as_array
from hybrid_k2.native import native


class MailboxHandoff(Handoff):
    """Hand batches over by flags in memory; the layers are of one runtime and have equal widths.

    An expert that does not exist is met by `take`: the experts' side checks it.
    `timeout_s` is how long `take` and `reset` wait for a computation. `tokens` is for how many there is room from the
    start; a larger batch makes room for itself.
    Effects: starts a thread.
    """

    def __init__(
        self, runtime: Any, layers: Mapping[int, NativeExperts], timeout_s: float = 60.0, tokens: int = 64
    ) -> None:
        shape = next(iter(layers.values())).shape
        self._timeout_s = timeout_s
        self._posted: dict[int, int] = {}  # slot -> layer
        self._layers = frozenset(layers)
        self._hidden = shape.hidden_size
        natives = {number: layer.native for number, layer in layers.items()}
        self._mailbox = native.Mailbox(runtime, shape.hidden_size, shape.num_experts_per_tok, tokens, natives)
        self._closed = False

    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See Handoff."""
        check_slot(slot)
        self._check_open()
        if layer not in self._layers:
            raise EngineError(f"layer {layer}: expected a layer with experts, got one without")
        if slot in self._posted:
            raise ValueError(f"slot {slot}: expected a free one, got one that holds layer {self._posted[slot]}")
        self._mailbox.keep_times(self.trace is not None)
        self._posted[slot] = layer  # before it is posted: an interrupt may come in between
        try:
            self._mailbox.post(slot, layer, as_array(hidden), as_array(ids), as_array(weights))
        except Exception:
            del self._posted[slot]
            raise

    def take(self, slot: int, layer: int) -> Tensor:
        """See Handoff."""
        check_slot(slot)
        self._check_open()
        if self._posted.get(slot) != layer:
            held = f"layer {self._posted[slot]}" if slot in self._posted else "nothing"
            raise ValueError(f"slot {slot}: expected it to hold layer {layer}, got {held}")
        output = torch.empty(self._mailbox.tokens(slot), self._hidden)
        start = time.monotonic_ns()
        try:
            done = self._mailbox.take(slot, output.numpy(), self._timeout_s)
        except EngineError as error:
            raise EngineError(f"layer {layer}: {error.message}") from error
        finally:
            self._trace(Label("wait", layer, slot, WAITS), start)
        if not done:
            raise EngineError(f"layer {layer}: expected the experts' result within {self._timeout_s:g} s, got none")
        del self._posted[slot]
        return output

    def reset(self) -> None:
        """See Handoff."""
        for slot in range(SLOTS):
            layer = self._posted.get(slot)
            if layer is None or self._closed:
                continue
            if not self._mailbox.give_up(slot, self._timeout_s):
                raise EngineError(
                    f"layer {layer}: expected the experts to end within {self._timeout_s:g} s of being given up, "
                    "got experts that still compute; the engine cannot go on before they end"
                )
            del self._posted[slot]

    def close(self) -> None:
        """See Handoff; ends what is in flight, and a `take` that waits for it."""
        self._closed = True
        self._mailbox.close()

    def _trace(self, wait: Label, start_ns: int) -> None:
        if self.trace is None:
            return
        self.trace.add(wait, start_ns, time.monotonic_ns())
        for layer, slot, _, start, stop in self._mailbox.take_times():
            self.trace.add(Label("experts", layer, slot, "experts"), start, stop)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("hand-off: expected an open one, got a closed one")

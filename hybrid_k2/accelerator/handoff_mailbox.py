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
from hybrid_k2.accelerator.slots import MINUTE, Slots, TimeLimit
from hybrid_k2.accelerator.trace import WAITS
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.cpu import NativeExperts, as_array
from hybrid_k2.native import native


class MailboxHandoff(Handoff):
    """Hand batches over by flags in memory; the layers are of one runtime and have equal widths.

    An expert that does not exist is met by `take`: the experts' side checks it.
    `limit` is how long `take` and `reset` wait for a computation. `tokens` is for how many there is room from the
    start; a larger batch makes room for itself.
    Effects: starts a thread.
    """

    def __init__(
        self,
        runtime: Any,
        layers: Mapping[int, NativeExperts],
        limit: TimeLimit = MINUTE,
        tokens: int = 64,
    ) -> None:
        shape = next(iter(layers.values())).shape
        self._hidden = shape.hidden_size
        natives = {number: layer.native for number, layer in layers.items()}
        self._mailbox = native.Mailbox(runtime, shape.hidden_size, shape.num_experts_per_tok, tokens, natives)
        self._slots = Slots(layers, limit)

    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See Handoff."""
        with self._slots.posting(slot, layer, len(hidden)):
            self._mailbox.keep_times(self.trace is not None)
            self._mailbox.post(slot, layer, as_array(hidden), as_array(ids), as_array(weights))

    def take(self, slot: int, layer: int) -> Tensor:
        """See Handoff."""
        with self._slots.taking(slot, layer) as posted:
            output = torch.empty(posted.tokens, self._hidden)
            start = time.monotonic_ns()
            try:
                done = self._mailbox.take(slot, output.numpy(), posted.limit_s)
            finally:
                self._trace(Label("wait", layer, slot, WAITS), start)
            if not done:
                raise EngineError(f"expected the experts' result within {posted.limit_s:g} s, got none")
        return output

    def reset(self) -> None:
        """See Handoff."""
        if self._slots.closed:
            return
        for slot, posted in self._slots.filled():
            if not self._mailbox.give_up(slot, posted.limit_s):
                raise EngineError(
                    f"layer {posted.layer}: expected the experts to end within {posted.limit_s:g} s of being given up, "
                    "got experts that still compute; the engine cannot go on before they end"
                )
            self._slots.free(slot)

    def close(self) -> None:
        """See Handoff; ends what is in flight, and a `take` that waits for it."""
        self._slots.close()
        self._mailbox.close()

    def _trace(self, wait: Label, start_ns: int) -> None:
        if self.trace is None:
            return
        self.trace.add(wait, start_ns, time.monotonic_ns())
        for layer, slot, _, start, stop in self._mailbox.take_times():
            self.trace.add(Label("experts", layer, slot, "experts"), start, stop)

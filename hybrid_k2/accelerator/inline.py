"""No accelerator: operations are executed by the thread that enqueues them, at once."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hybrid_k2.accelerator.base import Accelerator, Label


class InlineAccelerator(Accelerator):
    """Execute each operation when it is enqueued."""

    name = "inline"
    device = torch.device("cpu")

    def enqueue(self, op: Callable[[], None], label: Label) -> None:
        """See Accelerator."""
        start = time.monotonic_ns()
        with torch.inference_mode():
            op()
        if self.trace is not None:
            self.trace.add(label, start, time.monotonic_ns())

    def synchronize(self, timeout_s: float | None = None) -> None:
        """See Accelerator; there is nothing left to wait for."""

    def abandon(self) -> None:
        """See Accelerator; nothing is left to skip."""

    def close(self) -> None:
        """See Accelerator."""

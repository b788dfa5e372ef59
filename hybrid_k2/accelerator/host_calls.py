"""The hand-off from a CUDA stream by functions on the host, where triton is missing.

The driver calls them in the order of the stream, on a thread of its own: slower than kernels (others measured about 26
us for such a call), and a graph cannot replay them. Never run on a GPU: see docs/verified.md.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybrid_k2.accelerator.slot_memory import SlotMemory
from hybrid_k2.errors import EngineError, HardwareError

log = logging.getLogger("hybrid_k2")

HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
KEPT = 4096  # functions that may be in flight: a step has four for each layer


class HostCalls:
    """Post and take as kernels/mailbox.py does, by copies and host functions on the current stream."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._library = _cuda_runtime()
        self._kept: deque[Any] = deque(maxlen=KEPT)

    def post(self, slot: SlotMemory, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See kernels/mailbox.py."""
        rows = len(hidden)
        space = slot.hidden.flatten().view(hidden.dtype)[: hidden.numel()].view(hidden.shape)
        for target, source in ((space, hidden), (slot.ids[:rows], ids), (slot.weights[:rows], weights)):
            target.copy_(source, non_blocking=True)
        bf16 = hidden.dtype == torch.bfloat16
        self._launch(lambda: self._mailbox.raise_request(slot.number, layer, rows, bf16))

    def take(self, slot: SlotMemory, result: Tensor) -> Tensor:
        """See kernels/mailbox.py."""
        self._launch(lambda: self._mailbox.wait_reply(slot.number))
        return result.copy_(slot.output[: len(result)], non_blocking=True)

    def _launch(self, call: Callable[[], object]) -> None:
        def guarded(_: int | None) -> None:
            try:
                call()
            except (EngineError, ValueError) as error:  # of a step that has failed or been let go already
                log.debug("hand-off: %s", error)

        function = HostFunction(guarded)
        self._kept.append(function)  # it must live until the driver has called it
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if code := self._library.cudaLaunchHostFunc(stream, function, None):
            raise EngineError(f"hand-off: expected to launch a host function, got CUDA error {code}")


def _cuda_runtime() -> ctypes.CDLL:
    """Return the CUDA runtime that torch has loaded."""
    name = f"libcudart.so.{str(torch.version.cuda).split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise HardwareError(f"{name}: expected the CUDA runtime of torch {torch.__version__}, got {error}") from error

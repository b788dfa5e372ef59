"""The contract of the routed experts: a runtime per engine, a backend per MoE layer.

The output is `sum over k of weights[:, k] * expert[ids[:, k]](hidden)` with
`expert(x) = down @ (silu(gate @ x) * (up @ x))`, in FP32. A token's row depends on that token alone: not on the other
tokens of the batch, their order, or the number of threads. An expert that is computed elsewhere has the number -1 in
`ids`, and adds nothing.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid_k2.checkpoint import ExpertWeights, StoredExpert
from hybrid_k2.errors import EngineError

SLOTS = 2
ON_HOST = torch.device("cpu")
ELSEWHERE = -1


@dataclass(frozen=True)
class ExpertsShape:
    """Name the sizes of one layer of routed experts."""

    hidden_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"experts: expected {name} >= 1, got {value}")

    def check_expert(self, expert: int, weights: ExpertWeights) -> None:
        """Check one expert's number and the shapes of its matrices.

        Raises: ValueError naming the matrix.
        """
        if not 0 <= expert < self.n_routed_experts:
            raise ValueError(f"expert: expected 0..{self.n_routed_experts - 1}, got {expert}")
        inner = (self.moe_intermediate_size, self.hidden_size)
        for name, shape in (("gate", inner), ("up", inner), ("down", inner[::-1])):
            got = tuple(getattr(weights, name).shape)
            if got != shape:
                raise ValueError(f"expert {expert}, {name}: expected shape {list(shape)}, got {list(got)}")

    def check_call(self, hidden: Tensor, ids: Tensor, weights: Tensor, device: torch.device = ON_HOST) -> None:
        """Check the arguments of `forward` and `submit`, all but what `check_ids` does.

        device: where they are to lie.

        Raises: TypeError for a dtype, ValueError for a shape or a device.
        """
        if hidden.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"hidden: expected bfloat16 or float32, got {hidden.dtype}")
        if ids.dtype != torch.int32:
            raise TypeError(f"ids: expected int32, got {ids.dtype}")
        if weights.dtype != torch.float32:
            raise TypeError(f"weights: expected float32, got {weights.dtype}")
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden_size:
            raise ValueError(f"hidden: expected shape [T, {self.hidden_size}], got {list(hidden.shape)}")
        routing = (hidden.shape[0], self.num_experts_per_tok)
        for name, tensor in (("ids", ids), ("weights", weights)):
            if tuple(tensor.shape) != routing:
                raise ValueError(f"{name}: expected shape {list(routing)}, got {list(tensor.shape)}")
        for name, tensor in (("hidden", hidden), ("ids", ids), ("weights", weights)):
            if tensor.device.type != device.type:
                where = "a host tensor" if device.type == "cpu" else f"one on {device}"
                raise ValueError(f"{name}: expected {where}, got one on {tensor.device}")

    def check_ids(self, ids: Tensor) -> None:
        """Check that the experts exist, or are elsewhere. The native backend does so while it sorts tokens by expert.

        Raises: ValueError.
        """
        if ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < ELSEWHERE or high >= self.n_routed_experts:
                raise ValueError(f"ids: expected experts 0..{self.n_routed_experts - 1}, got {low}..{high}")


class ExpertsBackend(ABC):
    """Hold and compute the routed experts of one MoE layer."""

    def __init__(self, shape: ExpertsShape) -> None:
        self.shape = shape

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of host memory that the weights take."""

    @property
    def huge_page_share(self) -> float | None:
        """The part of the loaded weights that the system put on huge pages, 0 to 1; None where that is not known."""
        return None

    @abstractmethod
    def load_expert(self, expert: int, weights: ExpertWeights) -> None:
        """Take over one expert's weights; different experts may be loaded from different threads at once.

        Raises: ValueError for shapes that do not fit, or for a form of weights that the backend does not compute.
        """

    def load_stored(self, expert: int, stored: StoredExpert) -> None:
        """Take over one expert from an open checkpoint, as `load_expert`; without a copy in between where it can.

        Raises: CheckpointError naming tensor and file; as `load_expert`.
        """
        self.load_expert(expert, stored.read())

    @abstractmethod
    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum over the chosen experts.

        A token that holds a NaN or an infinity gets a row of NaN.
        Shapes: hidden [T, H] bf16 or fp32, ids [T, K] int32, weights [T, K] fp32 -> [T, H] fp32.
        Raises: TypeError, ValueError: arguments; EngineError: an expert was not loaded.
        """

    @abstractmethod
    def submit(self, slot: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Start a computation and return at once; the arguments are copied.

        Raises: as `forward`; ValueError for a slot that is in flight or not 0 or 1.
        """

    @abstractmethod
    def wait(self, slot: int, timeout_s: float | None = None) -> Tensor:
        """Return the result that `submit` started in this slot.

        Shapes: [T, H] fp32.
        Raises: EngineError if it takes longer than `timeout_s` (the slot stays in flight and can be waited for again);
        whatever the computation raised; ValueError for a slot that is not in flight.
        """

    def computed(self, slot: int) -> tuple[int, int] | None:
        """Return when the result that `wait` returned last from this slot was computed, from and to.

        Units: ns of CLOCK_MONOTONIC (`time.monotonic_ns`). None where that is not known.
        """
        return None

    def abandon(self, slot: int, timeout_s: float | None = None) -> None:
        """Free a slot whose result, or error, nobody wants any more; one that is not in flight stays as it is.

        Raises: EngineError if it takes longer than `timeout_s`; the slot stays in flight.
        """
        with suppress(Exception):
            self.wait(slot, timeout_s)
        with suppress(ValueError):  # it is not in flight, as it should be
            self.wait(slot, 0.0)

    @abstractmethod
    def close(self) -> None:
        """Release the weights; the backend cannot be used any more."""


class ExpertsRuntime(ABC):
    """Own what the layers of one engine share: threads, scratch memory, the choice of kernels.

    `native` is the extension's runtime, where there is one: other computations on the host run on the same threads.
    """

    name: str
    native: Any = None

    @abstractmethod
    def make_layer(
        self, hidden_size: int, moe_intermediate_size: int, n_routed_experts: int, num_experts_per_tok: int
    ) -> ExpertsBackend:
        """Allocate the experts of one layer, to be filled by `load_expert`."""

    @abstractmethod
    def measure_read_gbps(self, seconds: float = 0.1) -> float:
        """Return how many 10^9 bytes per second the runtime's threads can read from memory.

        Effects: takes the memory of `probe_bytes` meanwhile.
        Raises: MemoryBudgetError if there is too little.
        """

    def tune(self) -> None:  # noqa: B027 - most backends have nothing to arrange
        """Arrange the work for this machine, before weights take its memory; it changes the speed, not the results."""

    @abstractmethod
    def close(self) -> None:
        """Stop the threads; layers of this runtime cannot be used any more."""


def distinct_experts(ids: Tensor) -> list[int]:
    """Return the experts that `ids` names, ascending; not those that are elsewhere."""
    return sorted(set(ids.flatten().tolist()) - {ELSEWHERE})


def check_slot(slot: int) -> None:
    """Raise ValueError unless `slot` is one of the two slots."""
    if slot not in range(SLOTS):
        raise ValueError(f"slot: expected 0..{SLOTS - 1}, got {slot}")


class QueuedBackend(ExpertsBackend):
    """Give a backend that computes in one call the two slots, by queueing the calls on one thread of the runtime."""

    def __init__(self, shape: ExpertsShape, queue: ThreadPoolExecutor) -> None:
        super().__init__(shape)
        self._queue = queue
        self._slots: dict[int, Future[Tensor]] = {}
        self._computed: dict[int, tuple[int, int]] = {}

    @abstractmethod
    def _compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Compute `forward` for checked arguments, on the queue's thread."""

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertsBackend."""
        self.shape.check_call(hidden, ids, weights)
        self.shape.check_ids(ids)
        return self._queue.submit(self._compute, hidden, ids, weights).result()

    def submit(self, slot: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See ExpertsBackend."""
        check_slot(slot)
        if slot in self._slots:
            raise ValueError(f"slot {slot}: it is in flight; wait for it first")
        self.shape.check_call(hidden, ids, weights)
        self.shape.check_ids(ids)
        self._slots[slot] = self._queue.submit(self._compute_in, slot, hidden.clone(), ids.clone(), weights.clone())

    def _compute_in(self, slot: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        start = time.monotonic_ns()
        result = self._compute(hidden, ids, weights)
        self._computed[slot] = start, time.monotonic_ns()
        return result

    def wait(self, slot: int, timeout_s: float | None = None) -> Tensor:
        """See ExpertsBackend."""
        check_slot(slot)
        if slot not in self._slots:
            raise ValueError(f"slot {slot}: nothing was submitted")
        future = self._slots[slot]
        try:
            result = future.result(timeout_s)
        except FutureTimeoutError as error:
            if future.done():  # the computation itself raised it
                del self._slots[slot]
                raise
            raise EngineError(f"experts, slot {slot}: expected a result within {timeout_s} s, got none") from error
        except BaseException:
            if future.done():
                del self._slots[slot]
            raise
        del self._slots[slot]
        return result

    def computed(self, slot: int) -> tuple[int, int] | None:
        """See ExpertsBackend."""
        return self._computed.get(slot)

    def abandon(self, slot: int, timeout_s: float | None = None) -> None:
        """See ExpertsBackend; what comes next queues behind the computation."""
        self._slots.pop(slot, None)

"""The contract of an accelerator, and of the hand-off from it to the routed experts on the host.

An accelerator executes the operations of a step one after the other, on a lane of its own: a GPU's stream, or a thread.
Nothing in the list of operations depends on data, so the thread that enqueues them never waits in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_k2.accelerator.trace import Trace


@dataclass(frozen=True)
class Label:
    """Name an operation, for errors and for the trace."""

    name: str
    layer: int | None = None
    half: int | None = None
    lane: str = "accelerator"

    def __str__(self) -> str:
        parts = [self.name]
        if self.layer is not None:
            parts.append(f"layer {self.layer}")
        if self.half is not None:
            parts.append(f"half {self.half}")
        return ", ".join(parts)


class Accelerator(ABC):
    """Execute operations in the order in which one thread enqueues them.

    A step is what is enqueued between two calls of `synchronize`.
    `device` is where the tensors of the operations lie; `trace`, if it is set, gets the times of each operation.
    `captures`: it can record what operations launch.
    """

    name: str
    device: torch.device
    trace: Trace | None = None
    captures: bool = False

    def allocating(self) -> AbstractContextManager[object]:
        """Give what is allocated meanwhile to the lane, so that it is not reused before the lane is done with it."""
        return nullcontext()

    @abstractmethod
    def enqueue(self, op: Callable[[], None], label: Label) -> None:
        """Append an operation to the step; it runs in inference mode.

        After one that raises, the later ones of the step are skipped.
        Raises: EngineError if the accelerator is closed; where operations are executed at once, what `op` raises.
        """

    def capture(self, op: Callable[[], None]) -> Callable[[], None]:
        """Record what an operation launches, without executing it, and return an operation that launches all of it.

        What was recorded is launched with the same arguments, on the same memory: that of tensors made by `op` belongs
        to all recordings of this accelerator together, and what they leave there is lost. Has `op` run once before.
        Raises: NotImplementedError unless `captures`; RuntimeError if `op` does what cannot be recorded.
        """
        raise NotImplementedError(f"{self.name}: expected an accelerator that launches operations")

    @abstractmethod
    def synchronize(self, timeout_s: float | None = None) -> None:
        """Wait for all that was enqueued, and end the step; the next one may begin however this returns.

        Raises: what the first failing operation raised; EngineError that names the operation if `timeout_s` pass
        without any of them ending; an interrupt (Ctrl-C). The step is given up then.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Give up the step: what has not begun is skipped, also after a `synchronize` that failed.

        Does not wait: the operation that is running goes on, and the next step follows it.
        """

    @abstractmethod
    def close(self) -> None:
        """Skip what is left, wait for the operation that is running, and release threads and memory.

        Close the hand-off first: an operation may be waiting for it.
        """


class Handoff(ABC):
    """Pass batches to the routed experts of all MoE layers of a model, in two slots, and take their results.

    `trace`, if it is set, gets the times at which `take` waited, and those of the experts where they are known.
    `room`: tokens that a slot takes at most; None: any number. `concurrent`: the experts start with `post`, not `take`.
    `replays`: what both launch can be recorded by the accelerator.
    """

    trace: Trace | None = None
    room: int | None = None
    concurrent: bool = True
    replays: bool = False

    @abstractmethod
    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Start a layer's routed experts; the arguments are copied.

        To be called by the operations of an accelerator, as is `take`.
        Shapes: hidden [T, H] bf16 or fp32, ids [T, K] int32, weights [T, K] fp32.
        Raises: ValueError, TypeError: arguments, or a slot that is in flight; EngineError if the experts are closed.
        """

    @abstractmethod
    def take(self, slot: int, layer: int) -> Tensor:
        """Return the result of what was posted in this slot.

        Shapes: [T, H] fp32.
        Raises: EngineError that names the layer if the computation failed, or did not end in time; the slot holds it
        until `reset`. ValueError for a slot that does not hold this layer's computation.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget what is in flight, so that the next step starts clean; after a step that failed.

        To be called while no operation of the failed step runs: as the next operation of the accelerator, for example.
        Raises: EngineError that names the layer if a computation does not end in time; it can be called again.
        """

    @abstractmethod
    def close(self) -> None:
        """Release what the hand-off owns; the experts stay open."""

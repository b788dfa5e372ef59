"""The hand-off from a CUDA stream to the native experts: kernels on it speak the mailbox's protocol.

Nothing of CUDA is needed to build or import this. It has never run on a GPU: see docs/verified.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hybrid_k2.accelerator.base import Handoff, Label
from hybrid_k2.accelerator.cuda import CudaAccelerator
from hybrid_k2.accelerator.host_calls import HostCalls
from hybrid_k2.accelerator.kernels import have_triton
from hybrid_k2.accelerator.slot_memory import SlotMemory
from hybrid_k2.accelerator.slots import MINUTE, Slots, TimeLimit
from hybrid_k2.accelerator.trace import WAITS, Trace
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.base import SLOTS
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.native import native

MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class SlotCalls(Protocol):
    """What an accelerator launches to speak the mailbox's protocol: kernels/mailbox.py, or HostCalls."""

    def post(self, slot: SlotMemory, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Write a batch into the slot and raise its request flag."""

    def take(self, slot: SlotMemory, result: Tensor) -> Tensor:
        """Wait for the slot's reply, and read the result."""


class CudaHandoff(Handoff):
    """Hand batches of up to `room` tokens over through mapped host memory, to native experts of one runtime.

    A kernel that waits for the experts cannot raise: failures are raised when the accelerator synchronizes, whose time
    limit holds for them.
    Effects: registers with the accelerator, maps host memory, starts the thread that serves the mailbox.
    """

    room: int

    def __init__(
        self,
        accelerator: CudaAccelerator,
        runtime: Any,
        layers: Mapping[int, NativeExperts],
        room: int,
        limit: TimeLimit = MINUTE,
    ) -> None:
        self.room = room
        self._shape = next(iter(layers.values())).shape
        sizes = self._shape.hidden_size, self._shape.num_experts_per_tok
        natives = {number: layer.native for number, layer in layers.items()}
        self._accelerator = accelerator
        self._slots = Slots(layers, limit)
        self._mailbox = native.Mailbox(runtime, *sizes, room, natives)
        self._calls = _slot_calls(self._mailbox)
        self.replays = not isinstance(self._calls, HostCalls)
        self._mapped: list[int] = []
        try:
            self._map()
            self._memory = [self._slot(slot) for slot in range(SLOTS)]
        except BaseException:  # memory must not be given back while it is mapped
            self.close()
            raise
        accelerator.attach(self)

    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See Handoff; an expert that does not exist is a failure of the step."""
        self._shape.check_call(hidden, ids, weights, self._accelerator.device)
        if len(hidden) > self.room:
            raise ValueError(f"hidden: expected at most {self.room} tokens, got {len(hidden)}")
        with self._slots.posting(slot, layer, len(hidden)):
            self._calls.post(self._memory[slot], layer, hidden, ids, weights)

    def take(self, slot: int, layer: int) -> Tensor:
        """See Handoff; the result is on the GPU, and void if the step fails."""
        with self._slots.taking(slot, layer) as posted:
            result = torch.empty(posted.tokens, self._shape.hidden_size, device=self._accelerator.device)
            with self._accelerator.span(Label("wait", layer, slot, WAITS)):
                return self._calls.take(self._memory[slot], result)

    def reset(self) -> None:
        """See Handoff; lets the stream run dry first."""
        limit_s = self._slots.limit.of(self.room)
        if not self._accelerator.drain(limit_s):
            raise EngineError(
                f"{self._accelerator.name}: expected its operations to end within {limit_s:g} s, got some that "
                "still run; the engine cannot go on before they end"
            )
        for slot in range(SLOTS):
            if not self._mailbox.give_up(slot, limit_s):
                raise EngineError(
                    f"slot {slot}: expected the experts to end within {limit_s:g} s of being given up, got "
                    "experts that still compute; the engine cannot go on before they end"
                )
            self._slots.free(slot)
        self._mailbox.take_failure()

    def close(self) -> None:
        """See Handoff."""
        self._slots.close()
        self._mailbox.close()
        self._accelerator.drain(self._slots.limit.of(self.room))
        while self._mapped:
            torch.cuda.check_error(int(_runtime().cudaHostUnregister(self._mapped.pop())))

    def begin(self) -> None:
        """See Peer."""
        self._mailbox.keep_times(self.trace is not None)
        self._mailbox.keep_awake(True)

    def progress(self) -> object:
        """See Peer."""
        return self._flags()

    def waiting(self) -> str | None:
        """See Peer."""
        layers = [str(request[1]) for request, reply in self._flags() if request[0] != reply[0]]
        return f"no answer from the experts of layer {' and '.join(layers)}" if layers else None

    def release(self) -> None:
        """See Peer."""
        self._mailbox.release()

    def end(self) -> None:
        """See Peer."""
        trace: Trace | None = self.trace
        for layer, slot, _, start, stop in self._mailbox.take_times():
            if trace is not None:
                trace.add(Label("experts", layer, slot, "experts"), start, stop)
        if failure := self._mailbox.take_failure():
            raise EngineError(f"layer {failure[0]}: {failure[1]}")

    def rest(self) -> None:
        """See Peer."""
        self._mailbox.keep_awake(False)

    def _flags(self) -> list[tuple[list[int], list[int]]]:
        """Read ticket, layer, tokens and form of each slot's request; ticket and status of its reply."""
        return [(slot.request.tolist(), slot.reply.tolist()) for slot in self._memory]

    def _map(self) -> None:
        for address, size in self._mailbox.blocks():
            torch.cuda.check_error(int(_runtime().cudaHostRegister(address, size, MAPPED)))
            self._mapped.append(address)

    def _slot(self, slot: int) -> SlotMemory:
        request, reply, hidden, ids, weights, output = map(torch.from_numpy, self._mailbox.areas(slot))
        state = torch.zeros(2, dtype=torch.int32, device=self._accelerator.device)
        return SlotMemory(slot, request, reply, hidden, ids, weights, output, state)


def _slot_calls(mailbox: Any) -> SlotCalls:
    if not have_triton():
        return HostCalls(mailbox)
    from hybrid_k2.accelerator.kernels import mailbox as kernels

    return kernels


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]

"""A GPU by CUDA: operations are launched on a stream, and the hand-off is done by kernels on it.

Launching does not wait, so that `enqueue` returns at once, and what an operation raises there is raised there. Nothing
of CUDA is needed to build or import this. It has never run on a GPU: see docs/verified.md.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hybrid_k2.accelerator.base import Accelerator, Handoff, Label
from hybrid_k2.accelerator.host_calls import HostCalls
from hybrid_k2.accelerator.kernels import have_triton
from hybrid_k2.accelerator.slot_memory import SlotMemory
from hybrid_k2.accelerator.trace import WAITS, Trace
from hybrid_k2.errors import EngineError, HardwareError
from hybrid_k2.experts.base import SLOTS, check_slot
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.native import native

POLL_S = 50e-6
MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class SlotCalls(Protocol):
    """What an accelerator launches to speak the mailbox's protocol: kernels/mailbox.py, or HostCalls."""

    def post(self, slot: SlotMemory, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Write a batch into the slot and raise its request flag."""

    def take(self, slot: SlotMemory, result: Tensor) -> Tensor:
        """Wait for the slot's reply, and read the result."""


class Peer(Protocol):
    """What kernels of the stream may wait for."""

    def begin(self) -> None:
        """Be ready: a step begins."""

    def release(self) -> None:
        """Let go of kernels that wait now; the results of the step are void."""

    def end(self) -> None:
        """Rest, for a step has ended; raise what went wrong in it."""


@dataclass(frozen=True)
class Span:
    """The events around one operation."""

    label: Label
    start: torch.cuda.Event
    stop: torch.cuda.Event


class CudaAccelerator(Accelerator):
    """Launch operations on one stream of one GPU.

    The time limit of `synchronize` watches what was launched. An operation that itself waits for the stream, such as a
    copy to pageable memory, is not watched.
    Raises: HardwareError without the device.
    """

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise HardwareError(f"{device}: expected a CUDA device, got {torch.cuda.device_count()} of them")
        self.name = str(device)
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._peers: list[Peer] = []
        self._spans: deque[Span] = deque()  # launched and not yet seen to have ended
        self._began: tuple[torch.cuda.Event, int] | None = None  # the step, on the GPU's clock and on the host's
        self._closed = False

    def attach(self, peer: Peer) -> None:
        """Tell this peer from now on when steps begin and end, and when it keeps the stream waiting for too long."""
        self._peers.append(peer)

    def enqueue(self, op: Callable[[], None], label: Label) -> None:
        """See Accelerator."""
        if self._closed:
            raise EngineError(f"{self.name}: expected an open accelerator, got a closed one")
        with torch.cuda.stream(self.stream), torch.inference_mode():
            if self._began is None:
                self._begin()
            with self.span(label):
                op()

    @contextmanager
    def span(self, label: Label) -> Iterator[None]:
        """Mark what is launched meanwhile, for the trace and for errors; not inside a graph that is being captured."""
        if torch.cuda.is_current_stream_capturing():
            yield
            return
        start, stop = self._event(), self._event()
        start.record(self.stream)
        yield
        stop.record(self.stream)
        self._spans.append(Span(label, start, stop))

    def synchronize(self, timeout_s: float | None = None) -> None:
        """See Accelerator."""
        try:
            self._wait(timeout_s)
            for peer in self._peers:
                peer.end()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """See Accelerator; kernels cannot be skipped, so all that was launched runs."""
        self._began = None
        self._spans.clear()

    def close(self) -> None:
        """See Accelerator."""
        if not self._closed:
            self._closed = True
            self.drain(None)

    def drain(self, timeout_s: float | None) -> bool:
        """Let the stream run dry, without what it waits for; False if it does not within this time."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.stream.query():
            for peer in self._peers:
                peer.release()
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _begin(self) -> None:
        self.stream.wait_stream(torch.cuda.default_stream(self.device))  # tensors of the step may come from there
        began = self._event()
        began.record(self.stream)
        self._began = began, time.monotonic_ns()
        for peer in self._peers:
            peer.begin()

    def _wait(self, timeout_s: float | None) -> None:
        last = time.monotonic()
        while self._spans:
            first = self._spans[0]
            if first.stop.query():  # type: ignore[no-untyped-call]
                self._spans.popleft()
                self._trace(first)
                last = time.monotonic()
            elif timeout_s is not None and time.monotonic() - last > timeout_s:
                self.drain(timeout_s)
                raise EngineError(
                    f"{self.name}: {first.label}: expected an operation to end within {timeout_s:g} s, got none"
                )
            else:
                time.sleep(POLL_S)

    def _trace(self, span: Span) -> None:
        if self.trace is not None and self._began is not None:
            event, began_ns = self._began
            start, stop = (began_ns + int(event.elapsed_time(edge) * 1e6) for edge in (span.start, span.stop))
            self.trace.add(span.label, start, stop)

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=self.trace is not None)  # type: ignore[no-untyped-call]


class CudaHandoff(Handoff):
    """Hand batches of up to `room` tokens over through mapped host memory, to native experts of one runtime.

    A kernel that waits for the experts cannot raise: failures are raised when the accelerator synchronizes, whose time
    limit holds for them.
    Effects: registers with the accelerator, maps host memory, starts the thread that serves the mailbox.
    """

    def __init__(
        self,
        accelerator: CudaAccelerator,
        runtime: Any,
        layers: Mapping[int, NativeExperts],
        room: int,
        timeout_s: float = 60.0,
    ) -> None:
        shape = next(iter(layers.values())).shape
        natives = {number: layer.native for number, layer in layers.items()}
        self._accelerator = accelerator
        self._layers = frozenset(layers)
        self._room = room
        self._timeout_s = timeout_s
        self._posted: dict[int, tuple[int, torch.Size]] = {}  # slot -> layer, shape of the result
        self._mailbox = native.Mailbox(runtime, shape.hidden_size, shape.num_experts_per_tok, room, natives)
        self._calls = _slot_calls(self._mailbox)
        self._mapped: list[int] = []
        try:
            self._map()
            self._slots = [self._slot(slot) for slot in range(SLOTS)]
        except BaseException:  # memory must not be given back while it is mapped
            self.close()
            raise
        accelerator.attach(self)

    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See Handoff; an expert that does not exist is a failure of the step."""
        check_slot(slot)
        if slot in self._posted:
            raise ValueError(f"slot {slot}: expected a free one, got one that holds layer {self._posted[slot][0]}")
        if layer not in self._layers:
            raise EngineError(f"layer {layer}: expected a layer with experts, got one without")
        if len(hidden) > self._room:
            raise ValueError(f"hidden: expected at most {self._room} tokens, got {len(hidden)}")
        self._calls.post(self._slots[slot], layer, hidden, ids, weights)
        self._posted[slot] = layer, hidden.shape

    def take(self, slot: int, layer: int) -> Tensor:
        """See Handoff; the result is on the GPU, and void if the step fails."""
        check_slot(slot)
        held, shape = self._posted.get(slot, (None, torch.Size()))
        if held != layer:
            text = "nothing" if held is None else f"layer {held}"
            raise ValueError(f"slot {slot}: expected it to hold layer {layer}, got {text}")
        result = torch.empty(shape, dtype=torch.float32, device=self._accelerator.device)
        with self._accelerator.span(Label("wait", layer, slot, WAITS)):
            self._calls.take(self._slots[slot], result)
        del self._posted[slot]
        return result

    def reset(self) -> None:
        """See Handoff; lets the stream run dry first."""
        if not self._accelerator.drain(self._timeout_s):
            raise EngineError(
                f"{self._accelerator.name}: expected its operations to end within {self._timeout_s:g} s, got some that "
                "still run; the engine cannot go on before they end"
            )
        for slot in range(SLOTS):
            if not self._mailbox.give_up(slot, self._timeout_s):
                raise EngineError(
                    f"slot {slot}: expected the experts to end within {self._timeout_s:g} s of being given up, got "
                    "experts that still compute; the engine cannot go on before they end"
                )
        self._posted.clear()
        self._mailbox.take_failure()

    def close(self) -> None:
        """See Handoff."""
        self._mailbox.close()
        self._accelerator.drain(self._timeout_s)
        while self._mapped:
            torch.cuda.check_error(int(_runtime().cudaHostUnregister(self._mapped.pop())))

    def begin(self) -> None:
        """See Peer."""
        self._mailbox.keep_times(self.trace is not None)
        self._mailbox.keep_awake(True)

    def release(self) -> None:
        """See Peer."""
        self._mailbox.release()

    def end(self) -> None:
        """See Peer."""
        self._mailbox.keep_awake(False)
        trace: Trace | None = self.trace
        for layer, slot, _, start, stop in self._mailbox.take_times():
            if trace is not None:
                trace.add(Label("experts", layer, slot, "experts"), start, stop)
        if failure := self._mailbox.take_failure():
            raise EngineError(f"layer {failure[0]}: {failure[1]}")

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

"""A GPU by CUDA: operations are launched on a stream.

Launching does not wait, so that `enqueue` returns at once, and what an operation raises there is raised there. Nothing
of CUDA is needed to build or import this. It has never run on a GPU: see docs/verified.md.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hybrid_k2.accelerator.base import Accelerator, Label
from hybrid_k2.errors import EngineError, HardwareError

POLL_S = 50e-6


class Peer(Protocol):
    """What kernels of the stream may wait for."""

    def begin(self) -> None:
        """Be ready: a step begins."""

    def progress(self) -> object:
        """Return what changes with each thing that kernels ask for and get."""

    def waiting(self) -> str | None:
        """Say what was asked for and is not there, if anything."""

    def release(self) -> None:
        """Let go of kernels that wait now; the results of the step are void."""

    def end(self) -> None:
        """Raise what went wrong in a step that has ended."""

    def rest(self) -> None:
        """Wait for no kernel any more, until the next step begins."""


@dataclass(frozen=True)
class Span:
    """The events around one operation."""

    label: Label
    start: torch.cuda.Event
    stop: torch.cuda.Event


class CudaAccelerator(Accelerator):
    """Launch operations on one stream of one GPU.

    The time limit of `synchronize` watches what was launched: it is how long nothing ends and no peer makes progress,
    so that a graph of a whole step has the limit of one operation. An operation that itself waits for the stream, such
    as a copy to pageable memory, is not watched.
    Raises: HardwareError without the device.
    """

    captures = True

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise HardwareError(f"{device}: expected a CUDA device, got {torch.cuda.device_count()} of them")
        self.name = str(device)
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._peers: list[Peer] = []
        self._spans: deque[Span] = deque()  # launched and not yet seen to have ended
        self._began: tuple[torch.cuda.Event, int] | None = None  # the step, on the GPU's clock and on the host's
        self._pool: Any = None  # the memory of all graphs, taken with the first
        self._closed = False

    def attach(self, peer: Peer) -> None:
        """Tell this peer from now on when steps begin and end, and when it keeps the stream waiting for too long."""
        self._peers.append(peer)

    def allocating(self) -> AbstractContextManager[object]:
        """See Accelerator."""
        return torch.cuda.stream(self.stream)

    def enqueue(self, op: Callable[[], None], label: Label) -> None:
        """See Accelerator."""
        if self._closed:
            raise EngineError(f"{self.name}: expected an open accelerator, got a closed one")
        with torch.cuda.stream(self.stream), torch.inference_mode():
            if self._began is None:
                self._begin()
            with self.span(label):
                op()

    def capture(self, op: Callable[[], None]) -> Callable[[], None]:
        """See Accelerator; waits for the GPU first. Other threads may use it meanwhile: they copy experts, and pin."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        recording = torch.cuda.graph(graph, self._pool, self.stream, capture_error_mode="thread_local")
        # The stream once more around it: where a recording fails, torch does not go back to the one before.
        with torch.cuda.stream(self.stream), torch.inference_mode(), recording:
            op()
        return graph.replay

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
        """See Accelerator; kernels cannot be skipped, so all that was launched runs, and peers rest when it has."""
        self._began = None
        self._spans.clear()
        if self.stream.query():
            for peer in self._peers:
                peer.rest()

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
        last, seen = time.monotonic(), self._progress()
        while self._spans:
            first, progress = self._spans[0], self._progress()
            if first.stop.query():  # type: ignore[no-untyped-call]
                self._spans.popleft()
                self._trace(first)
                last = time.monotonic()
            elif progress != seen:
                last, seen = time.monotonic(), progress
            elif timeout_s is not None and time.monotonic() - last > timeout_s:
                waiting = [text for peer in self._peers if (text := peer.waiting()) is not None]
                self.drain(timeout_s)
                raise EngineError(
                    f"{self.name}: {first.label}: expected an operation to end within {timeout_s:g} s, got none"
                    + "".join(f"; {text}" for text in waiting)
                )
            else:
                time.sleep(POLL_S)

    def _progress(self) -> list[object]:
        return [peer.progress() for peer in self._peers]

    def _trace(self, span: Span) -> None:
        if self.trace is not None and self._began is not None:
            event, began_ns = self._began
            start, stop = (began_ns + int(event.elapsed_time(edge) * 1e6) for edge in (span.start, span.stop))
            self.trace.add(span.label, start, stop)

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=self.trace is not None)  # type: ignore[no-untyped-call]

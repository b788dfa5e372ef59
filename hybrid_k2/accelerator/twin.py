"""The host twin: a thread in the place of a GPU.

It executes the same operations in the same order as a GPU's stream would, beside the thread that enqueues them and the
threads of the experts. So all that concerns order, slots and errors runs on machines without a GPU.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import torch

from hybrid_k2.accelerator.base import Accelerator, Label
from hybrid_k2.accelerator.trace import Trace
from hybrid_k2.errors import EngineError

log = logging.getLogger("hybrid_k2")

CLOSE_S = 10.0  # how long `close` waits for the operation that is running

Item = tuple[int, Callable[[], None], Label, Trace | None]  # the step's number, and an operation of it


class _Lane:
    """What the twin and its thread share; the thread holds no reference to the twin, which may go out of use."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Item | threading.Event | None] = SimpleQueue()
        self.running: Label | None = None
        self.done = 0  # operations that have ended, in any way
        self._lock = threading.Lock()
        self._skipped = 0  # operations of this step and of those before it are not run
        self._error: tuple[int, BaseException] | None = None

    def skip(self, step: int, error: BaseException | None = None) -> None:
        """Skip what is left of the steps up to this one; an error counts if it is the first."""
        with self._lock:
            if step > self._skipped:
                self._skipped = step
                self._error = (step, error) if error is not None else None

    def take_error(self, step: int) -> BaseException | None:
        """Return what failed in this step, once."""
        with self._lock:
            error, self._error = self._error, None
        return error[1] if error is not None and error[0] == step else None

    def work(self) -> None:
        """Execute what is enqueued until None comes."""
        with torch.inference_mode():
            while (item := self.queue.get()) is not None:
                if isinstance(item, threading.Event):
                    item.set()
                elif item[0] > self._skipped:
                    self._execute(*item)
                del item  # what the operation holds is released before the next one comes

    def _execute(self, step: int, op: Callable[[], None], label: Label, trace: Trace | None) -> None:
        self.running = label
        start = time.monotonic_ns()
        try:
            op()
        except BaseException as error:  # it belongs to the thread that synchronizes
            self.skip(step, error)
        if trace is not None:
            trace.add(label, start, time.monotonic_ns())
        self.running = None
        self.done += 1


class HostTwin(Accelerator):
    """Execute operations on one thread of its own."""

    device = torch.device("cpu")

    def __init__(self, name: str = "twin") -> None:
        self.name = name
        self._lane = _Lane()
        self._step = 1
        self._process = os.getpid()
        # A daemon, ended by the finalizer: one that waits for a peer in vain must not keep the program from ending.
        self._thread = threading.Thread(target=self._lane.work, name=f"k2-{name}", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._lane, self._thread, self._process)

    def enqueue(self, op: Callable[[], None], label: Label) -> None:
        """See Accelerator."""
        self._check_open()
        self._lane.queue.put((self._step, op, label, self.trace))

    def synchronize(self, timeout_s: float | None = None) -> None:
        """See Accelerator."""
        self._check_open()
        fence = threading.Event()
        try:
            self._lane.queue.put(fence)
            self._wait(fence, timeout_s)
            error = self._lane.take_error(self._step)
        finally:
            self.abandon()
        if error is not None:
            try:
                raise error
            finally:
                del error  # or it would keep itself alive, by its traceback and this frame

    def abandon(self) -> None:
        """See Accelerator."""
        if os.getpid() != self._process:
            return
        self._lane.skip(self._step)
        self._step += 1

    def close(self) -> None:
        """See Accelerator; waits for 10 s at most, and then warns."""
        self.abandon()
        self._end()

    def _wait(self, fence: threading.Event, timeout_s: float | None) -> None:
        done = self._lane.done
        while not fence.wait(timeout_s):
            if done == self._lane.done:
                # The label is read last: it may have been the end of the step, after all.
                place = self._lane.running
                if fence.is_set():
                    return
                raise EngineError(
                    f"{self.name}: {place or 'between two operations'}: expected an operation to end within "
                    f"{timeout_s:g} s, got none"
                )
            done = self._lane.done

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise EngineError(f"{self.name}: expected the process that started it, got a fork of it")
        if not self._end.alive:
            raise EngineError(f"{self.name}: expected an open accelerator, got a closed one")


def _end(lane: _Lane, thread: threading.Thread, process: int) -> None:
    """End the twin's thread, unless this is a fork of its process, where it does not exist."""
    if os.getpid() != process:
        return
    lane.queue.put(None)
    if thread is threading.current_thread():
        return
    thread.join(CLOSE_S)
    if thread.is_alive():
        log.warning("%s: %s has not ended after %g s; its thread stays", thread.name, lane.running, CLOSE_S)

"""Streamed experts: brought to the accelerator for one batch, through a few places, while it computes.

A thread copies experts in the order in which they are asked for. They are computed in that order, a few at a time,
while the next ones arrive, of the same layer or of the next one. Which ones, and in which order they are added, is the
caller's choice alone; how long a copy takes changes no result.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor

from hybrid_k2.accelerator.base import Label
from hybrid_k2.accelerator.pinning import PinnedMemory
from hybrid_k2.accelerator.trace import Trace
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.base import ELSEWHERE
from hybrid_k2.experts.cpu import NativeExperts

TOGETHER = 4  # experts that are computed at a time
PLACES = 2 * TOGETHER  # and as many arrive meanwhile


class Arrival:
    """One expert on its way. `place`: where it will be, of PLACES."""

    def __init__(self, layer: int, expert: int, place: int, step: int) -> None:
        self.layer, self.expert, self.place, self.step = layer, expert, place, step
        self.done = False
        self.error: Exception | None = None


class ExpertStream(ABC):
    """Bring experts of the host's layers to the accelerator, and compute them there.

    `trace`, if it is set, gets the times of the copies.
    Effects: starts a thread.
    """

    trace: Trace | None = None
    pinned: PinnedMemory | None = None  # where copies are faster for it; closed with the stream

    def __init__(self, layers: Mapping[int, NativeExperts], timeout_s: float) -> None:
        """`timeout_s` is how long `compute` waits for one expert."""
        self._layers = dict(layers)
        self._timeout_s = timeout_s
        self._queue: SimpleQueue[Arrival | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._step = 0  # what was asked for in earlier ones is not wanted any more
        self._asked = 0
        self._used = 0  # places
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="k2-stream", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Begin a step: forget what an earlier one that failed has asked for."""
        with self._changed:
            self._step += 1
            self._asked = self._used = 0
            self._changed.notify_all()

    def on_host(self, layer: int) -> list[int]:
        """List the experts of a layer that can be asked for."""
        source = self._layers[layer]
        return [expert for expert in range(source.shape.n_routed_experts) if source.holds(expert)]

    def ask(self, layer: int, experts: Sequence[int]) -> list[Arrival]:
        """Ask for experts of a layer; all that is asked for is to be computed in the same order."""
        arrivals = []
        for expert in experts:
            arrivals.append(Arrival(layer, expert, self._asked % PLACES, self._step))
            self._asked += 1
            self._queue.put(arrivals[-1])
        return arrivals

    def compute(self, arrivals: Sequence[Arrival], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return each token's weighted sum over the chosen experts that arrive, and let their places go.

        Shapes: hidden [T, H] bf16 or fp32, ids [T, K] int32, weights [T, K] fp32 -> [T, H] fp32, on the accelerator.
        Raises: EngineError that names layer and expert if one does not arrive.
        """
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for first in range(0, len(arrivals), TOGETHER):
            some = arrivals[first : first + TOGETHER]
            for arrival in some:
                self._wait(arrival)
            self._add(out, some, hidden, ids, weights)
            with self._changed:
                self._used -= len(some)
                self._changed.notify_all()
        return out

    def wait_for(self, arrivals: Sequence[Arrival]) -> None:
        """Wait until experts are there, which are not computed. Raises: as `compute`."""
        for arrival in arrivals:
            self._wait(arrival)

    def close(self) -> None:
        """End; a `compute` that waits ends with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._queue.put(None)
        self._thread.join()
        if self.pinned is not None:
            self.pinned.close()
        self._layers.clear()

    @abstractmethod
    def _copy(self, source: NativeExperts, expert: int, place: int) -> None:
        """Copy an expert to its place, on the stream's thread."""

    @abstractmethod
    def _add(self, out: Tensor, some: Sequence[Arrival], hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Add the weighted outputs of experts that are there to `out`."""

    def _work(self) -> None:
        with torch.inference_mode():
            while (arrival := self._queue.get()) is not None:
                with self._changed:
                    self._changed.wait_for(lambda a=arrival: self._used < PLACES or self._closed or self._stale(a))  # type: ignore[misc]
                    if self._closed or self._stale(arrival):
                        continue
                    self._used += 1
                self._bring(arrival)

    def _bring(self, arrival: Arrival) -> None:
        start = time.monotonic_ns()
        try:
            self._copy(self._layers[arrival.layer], arrival.expert, arrival.place)
        except Exception as error:
            arrival.error = error
        if self.trace is not None:
            self.trace.add(Label(f"expert {arrival.expert}", arrival.layer, lane="copies"), start, time.monotonic_ns())
        with self._changed:
            arrival.done = True
            self._changed.notify_all()

    def _stale(self, arrival: Arrival) -> bool:
        return arrival.step != self._step

    def _wait(self, arrival: Arrival) -> None:
        with self._changed:
            self._changed.wait_for(lambda: arrival.done or self._closed, self._timeout_s)
        name = f"layer {arrival.layer}: expert {arrival.expert}"
        if arrival.error is not None:
            raise EngineError(f"{name}: expected it to be copied to the accelerator, got: {arrival.error}")
        if not arrival.done:
            why = "a closed stream" if self._closed else "none"
            raise EngineError(f"{name}: expected it on the accelerator within {self._timeout_s:g} s, got {why}")


class TwinExpertStream(ExpertStream):
    """Copy experts within the host's memory, and compute them on the twin's threads."""

    def __init__(self, layers: Mapping[int, NativeExperts], places: NativeExperts, timeout_s: float) -> None:
        """`places`: a layer of the twin's runtime with PLACES experts."""
        self._places = places
        super().__init__(layers, timeout_s)

    def _copy(self, source: NativeExperts, expert: int, place: int) -> None:
        self._places.store_expert(place, source.read_l32_expert(expert))

    def _add(self, out: Tensor, some: Sequence[Arrival], hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        here = torch.full_like(ids, ELSEWHERE)
        for arrival in some:
            here[ids == arrival.expert] = arrival.place
        rows = (here >= 0).any(dim=1).nonzero().squeeze(1)  # [n]
        if len(rows):
            out[rows] += self._places.forward(hidden[rows], here[rows], weights[rows])

    def close(self) -> None:
        """See ExpertStream."""
        super().close()
        self._places.close()

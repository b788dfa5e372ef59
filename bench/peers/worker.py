"""One contender's process: loads its layer, runs it on request, answers in JSON lines. Run by `process.py`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.exchange import Array, Layer, Sizes

# name -> module, class. The import is the contender's own: an absent package is an answer, not an error.
LAYERS = {
    "exact": ("ours", "OurLayer"),
    "fast": ("ours", "OurLayer"),
    "kt-kernel": ("kt", "KtLayer"),
    "ggml": ("ggml", "GgmlLayer"),
    "ik_llama": ("ggml", "IkLayer"),
}
PR_SET_PDEATHSIG = 1
THREAD_CLOCK = 6


class Session:
    """Answer the requests of a comparison."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.layer: Layer
        self.hidden: Array
        self.seen: set[int] = set()

    def answer(self, do: str, **request: Any) -> dict[str, Any]:
        """Do what a request says and return the answer."""
        if do == "load":
            return self.load(Sizes(**request["sizes"]), request["threads"])
        if do == "limits":
            return self.layer.limits(request["seconds"])  # type: ignore[attr-defined, no-any-return]
        return self.run(request["tokens"])

    def load(self, sizes: Sizes, threads: int) -> dict[str, Any]:
        """Make the layer."""
        module, kind = LAYERS[self.name]
        self.hidden = np.load(self.folder / "hidden.npy")
        self.layer = getattr(import_module(f"bench.peers.{module}"), kind)(self.name, self.folder, sizes, threads)
        return {"about": self.layer.about}

    def run(self, tokens: int) -> dict[str, Any]:
        """Time the calls whose routing lies in the folder, and leave the last one's output there.

        One token goes first, untimed, to wake the threads; a number of tokens that is new runs once untimed, for its
        scratch memory.
        """
        ids, weights = np.load(self.folder / "ids.npy"), np.load(self.folder / "weights.npy")
        self._call(ids[0][:1], weights[0][:1])
        if tokens not in self.seen:
            self.seen.add(tokens)
            self._call(ids[0], weights[0])
        times = [self._call(*routing) for routing in zip(ids, weights, strict=True)]
        np.save(self.folder / f"output.{self.name}.npy", self.layer.output())
        return {clock: [each[clock] for each in times] for clock in ("wall", "cpu")}

    def _call(self, ids: Array, weights: Array) -> dict[str, float]:
        """Compute once. Units: seconds; cpu: processor time of the busiest thread."""
        self.layer.prepare(self.hidden[: len(ids)], ids, weights)
        before = _thread_seconds()
        start = time.perf_counter()
        self.layer.run()
        wall = time.perf_counter() - start
        return {
            "wall": wall,
            "cpu": max(spent - before.get(thread, 0.0) for thread, spent in _thread_seconds().items()),
        }


def _thread_seconds() -> dict[int, float]:
    """Return the processor time of each thread of this process; a thread's clock has a number made of the thread's."""
    spent: dict[int, float] = {}
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(OSError):  # it has just ended
            spent[thread] = time.clock_gettime(~thread << 3 | THREAD_CLOCK)
    return spent


def main() -> None:
    """Answer each line of stdin. What a package prints goes to stderr."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it may be stopped when the comparison is killed
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session = Session(sys.argv[1], Path(sys.argv[2]))
    for line in sys.stdin:
        try:
            answer = session.answer(**json.loads(line))
        except Exception as error:  # whatever it is, it is the reason why this contender is left out
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

"""Pin the experts' memory for a GPU's copies, in the background while the model computes; never run on a GPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator

import torch

log = logging.getLogger("hybrid_k2")

CHUNK_BYTES = 64 << 30  # at once: larger ones were seen to fail
PORTABLE = 1  # cudaHostRegisterPortable
Range = tuple[int, int]  # address, bytes


class PinnedMemory:
    """Pin ranges of host memory one after the other on a thread; what cannot be pinned works all the same, slower."""

    def __init__(
        self,
        ranges: Iterable[Range],
        register: Callable[[int, int], None] | None = None,
        unregister: Callable[[int], None] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """`register` and `unregister` are CUDA's unless others are given; one that fails raises RuntimeError."""
        self._chunks = [chunk for one in ranges for chunk in _chunks(one, chunk_bytes)]
        self._register = register or _register
        self._unregister = unregister or _unregister
        self._pinned: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pin, name="k2-pinning", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and let the memory go, before it is given back."""
        self._stop.set()
        self._thread.join()
        while self._pinned:
            self._unregister(self._pinned.pop())

    def _pin(self) -> None:
        for address, nbytes in self._chunks:
            if self._stop.is_set():
                return
            try:
                self._register(address, nbytes)
            except RuntimeError as error:
                log.warning(
                    "%d of %d parts of the experts' memory are pinned, and no more: %s; streamed experts are copied "
                    "through a buffer of the driver from the others, which is slower (see ulimit -l)",
                    len(self._pinned),
                    len(self._chunks),
                    error,
                )
                return
            self._pinned.append(address)


def _chunks(whole: Range, most: int) -> Iterator[Range]:
    address, nbytes = whole
    for first in range(0, nbytes, most):
        yield address + first, min(most, nbytes - first)


def _register(address: int, nbytes: int) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(runtime.cudaHostRegister(address, nbytes, PORTABLE)))


def _unregister(address: int) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(runtime.cudaHostUnregister(address)))

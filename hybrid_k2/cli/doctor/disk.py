"""How fast the disk reads a part of a checkpoint, past the page cache where the file system can do that."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hybrid_k2.cli.doctor.finding import FAILED, OK, WARNING, Finding
from hybrid_k2.placement.sizes import format_bytes

PIECE = 8 << 20
MOST_BYTES = 512 << 20
MOST_SECONDS = 1.0
SLOW = 200e6  # bytes per second: K2.6 would take most of an hour


def measure_read(files: Sequence[Path]) -> Iterator[Finding]:
    """Read of the largest file for a second at most, from its middle on, and say how long all of them would take.

    Loading reads with several threads, which may be faster.
    """
    sizes = {file: file.stat().st_size for file in files}
    largest = max(sizes, key=lambda file: sizes[file])
    if sizes[largest] < 2 * PIECE:
        yield Finding("disk", OK, f"not measured: {largest.name} is too small for that")
        return
    try:
        done, seconds, how = _read(largest, sizes[largest])
    except OSError as error:
        hint = "look for the disk's errors in the system's log"
        yield Finding("disk", FAILED, f"{largest}: cannot be read: {error.strerror}", hint)
        return
    speed, total = done / seconds, sum(sizes.values())
    text = (
        f"{format_bytes(int(speed))}/s {how}, one thread; "
        f"at that speed {format_bytes(total)} take {max(1.0, total / speed):.0f} s"
    )
    if speed < SLOW:
        yield Finding("disk", WARNING, text, "keep the checkpoint on a local NVMe disk")
    else:
        yield Finding("disk", OK, text)


def _read(file: Path, size: int) -> tuple[int, float, str]:
    """Return bytes, seconds, and how they were read. Raises: OSError."""
    try:
        return *_read_with(os.O_RDONLY | os.O_DIRECT, file, size), "past the page cache"
    except OSError:  # as on a file system in memory
        return *_read_with(os.O_RDONLY, file, size), "with the page cache"


def _read_with(flags: int, file: Path, size: int) -> tuple[int, float]:
    fd = os.open(file, flags)
    try:
        with mmap.mmap(-1, PIECE) as memory:  # aligned, as direct reads want it
            offset, done = size // 2 // PIECE * PIECE, 0
            start = time.perf_counter()
            while done < MOST_BYTES and time.perf_counter() - start < MOST_SECONDS:
                count = os.preadv(fd, [memory], offset + done)
                done += count
                if count < PIECE:
                    break
            return done, time.perf_counter() - start
    finally:
        os.close(fd)

"""How large a buffer measures the memory's read bandwidth: far beyond the caches, within the memory that is free."""

from __future__ import annotations

from hybrid_k2.errors import MemoryBudgetError
from hybrid_k2.host.memory import host_memory

MIB = 1 << 20
WANTED_BYTES = 512 * MIB
WANTED_BYTES_PER_THREAD = 64 * MIB  # a core's share of the largest caches is about 12 MiB
LEAST_BYTES = 64 * MIB
LEAST_BYTES_PER_THREAD = 8 * MIB


def probe_bytes(threads: int) -> int:
    """Return how many bytes a probe on this many threads may take: at most a quarter of what is free.

    Raises: MemoryBudgetError: that would measure the caches.
    """
    _, available = host_memory()
    granted = min(max(WANTED_BYTES, threads * WANTED_BYTES_PER_THREAD), available // 4)
    least = max(LEAST_BYTES, threads * LEAST_BYTES_PER_THREAD)
    if granted < least:
        raise MemoryBudgetError(
            f"read bandwidth: expected {4 * least // MIB} MiB of free memory to measure it with {threads} threads, "
            f"got {available // MIB} MiB",
            hint="fewer threads need less",
        )
    return granted

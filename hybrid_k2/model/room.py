"""Memory that runs out although the plan fits: one error that names what had no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hybrid_k2.errors import MemoryBudgetError
from hybrid_k2.placement.memories import HOST, memory_of

_HOST_ALLOCATOR = "DefaultCPUAllocator"  # names itself in the RuntimeError that torch raises on the host


@contextmanager
def room_for(what: str, device: str) -> Iterator[None]:
    """Allocate something, in the memory of a device as the plan names it.

    Raises: MemoryBudgetError where the extension, numpy or torch say that there is none left.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and _HOST_ALLOCATOR not in str(error):
            raise
        if memory_of(device) == HOST:
            place, hint = "in host memory", "the plan counts on memory that another program or a limit has taken since"
        else:
            place = f"on {device}"
            hint = "another program may be using the GPU; the plan counts on all of its memory"
        raise MemoryBudgetError(f"{what}: expected room {place}, got none left", hint=hint) from error

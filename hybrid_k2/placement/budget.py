"""How much of each device a plan may take, and the refusal of a plan that takes more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_k2.errors import MemoryBudgetError
from hybrid_k2.placement.form import Rules
from hybrid_k2.placement.machine import Gpu, Machine
from hybrid_k2.placement.sizes import GIB, MIB, format_bytes

CONTEXT_BYTES = 512 * MIB  # of a process on the GPU, by common experience; it grows with the number of multiprocessors
LIBRARY_BYTES = 128 * MIB  # code of the kernels, cuBLAS and its workspace (32 MiB on Hopper)


@dataclass(frozen=True)
class Budget:
    """Hold what weights and KV cache may take on one device, and where the bound comes from."""

    nbytes: int
    origin: str


def reserve_bytes(available: int) -> int:
    """Return what is kept free of weights and cache: 1 GiB and 2 %, at most half of what there is.

    The gigabyte is for Python, torch and the activations of a chunk; the 2 % for allocator rounding and page tables.
    The half lets a small model run on a small machine.
    """
    return min(GIB + available // 50, available // 2)


def gpu_reserve_bytes(available: int, *, context: bool) -> int:
    """Return what is kept free on a GPU: code and libraries, 1 %, and the context unless it is there already.

    Activations, graphs and the allocator's rounding stand in the plan (`overheads`). The 1 % is for the rest.
    """
    fixed = LIBRARY_BYTES + (CONTEXT_BYTES if context else 0)
    return min(fixed + available // 100, available // 2)


def find_budget(device: str, rules: Rules, machine: Machine) -> Budget:
    """Return the budget of a device: its free memory less the reserve, and on the host at most what the rules say."""
    gpu = machine.find_gpu(device)
    if gpu is not None:
        return _gpu_budget(gpu, rules)
    available = machine.host_available_bytes
    reserve = reserve_bytes(available)
    free = Budget(available - reserve, f"{format_bytes(available)} free less {format_bytes(reserve)} in reserve")
    limit = rules.devices.host_memory_bytes
    if limit is None or limit >= free.nbytes:
        return free
    return Budget(limit, f"devices.host.memory on line {rules.devices.host_memory_line}")


def _gpu_budget(gpu: Gpu, rules: Rules) -> Budget:
    """Take a card as it is free, or as the rules size it where that is less; the reserve is part of the size."""
    limit = rules.devices.gpu_memory_bytes
    if limit is not None and limit <= gpu.free_bytes:
        available, origin = (
            limit,
            f"devices.gpu_memory of {format_bytes(limit)} on line {rules.devices.gpu_memory_line}",
        )
    else:
        available, origin = gpu.free_bytes, f"{format_bytes(gpu.free_bytes)} free"
    reserve = gpu_reserve_bytes(available, context=gpu.available_bytes is None)
    return Budget(available - reserve, f"{origin} less {format_bytes(reserve)} in reserve")


def check_budget(device: str, budget: Budget, items: Sequence[tuple[int, str]], rules: Rules) -> None:
    """Refuse a device whose items, as (bytes, description), exceed its budget. Raises: MemoryBudgetError."""
    needed = sum(nbytes for nbytes, _ in items)
    if needed <= budget.nbytes:
        return
    biggest = ", ".join(f"{what} {format_bytes(nbytes)}" for nbytes, what in sorted(items, reverse=True)[:3])
    raise MemoryBudgetError(
        f"{rules.source}: {device}: expected a plan of at most {format_bytes(budget.nbytes)} ({budget.origin}), "
        f"got {format_bytes(needed)}; the biggest: {biggest}",
        hint=_hint(device, budget),
    )


def _hint(device: str, budget: Budget) -> str:
    if device != "host":
        return "place less on the GPU, lower kv_cache tokens, or use rules/host.yaml"
    if budget.origin.startswith("devices"):
        return "raise devices.host.memory, or lower kv_cache tokens"
    return (
        "free host memory (other programs, the container's limit), lower kv_cache tokens, or use a larger machine; "
        "--dry-run --host-memory SIZE plans for one"
    )

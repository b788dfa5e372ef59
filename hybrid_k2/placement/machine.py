"""What the machine has: memory, cores and GPUs, as this process may use them.

A `Machine` is probed, or written by hand to plan for another machine.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_k2.host.cgroup import cgroup_cpu_limit
from hybrid_k2.host.memory import host_memory
from hybrid_k2.host.topology import HostNode, host_nodes, numa_balancing, physical_cores
from hybrid_k2.placement.sizes import format_bytes

NO_DRIVER = "no NVIDIA driver"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    available_bytes: what is free now; None when it is not known (then all of it). capability: of its instructions, as
    (8, 9); None when it is not known.
    """

    index: int
    name: str
    memory_bytes: int
    available_bytes: int | None = None
    capability: tuple[int, int] | None = None

    @property
    def device(self) -> str:
        """Return the device's name in a plan."""
        return f"cuda:{self.index}"

    @property
    def free_bytes(self) -> int:
        """Return the memory that a plan may count on."""
        return self.memory_bytes if self.available_bytes is None else self.available_bytes


@dataclass(frozen=True, repr=False)
class Machine:
    """Describe a machine.

    host_memory_bytes: the host's memory, or the cgroup's limit where that is lower.
    host_available_bytes: what this process can still take without swapping.
    cores: physical cores that this process may use (affinity and cgroup quota).
    gpu_note: why there are no GPUs, when there are none.
    core_cpus: the logical CPUs of each core; empty when they are not known. nodes: the NUMA nodes; empty as well.
    cpu_quota: the process has a share of the CPUs' time, not CPUs of its own.
    numa_balancing: the kernel moves pages between nodes on its own.
    notes: what of this is not so here, for a machine that is described and not probed.
    """

    host_memory_bytes: int
    host_available_bytes: int
    cores: int
    gpus: tuple[Gpu, ...] = ()
    gpu_note: str = ""
    core_cpus: tuple[tuple[int, ...], ...] = ()
    nodes: tuple[HostNode, ...] = ()
    cpu_quota: bool = False
    numa_balancing: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.host_available_bytes <= self.host_memory_bytes or self.cores < 1:
            raise ValueError(f"Machine: expected 0 <= available <= memory and at least one core, got {self!r}")

    def __repr__(self) -> str:
        gpus = ", ".join(f"{gpu.device} {gpu.name} {format_bytes(gpu.memory_bytes)}" for gpu in self.gpus)
        host = f"{format_bytes(self.host_available_bytes)} of {format_bytes(self.host_memory_bytes)} available"
        nodes = f" on {len(self.nodes)} NUMA nodes" if len(self.nodes) > 1 else ""
        return f"Machine({host}, {self.cores} cores{nodes}, {gpus or 'no GPU'})"

    def find_gpu(self, device: str) -> Gpu | None:
        """Find the GPU of a device name ("cuda:0")."""
        return next((gpu for gpu in self.gpus if gpu.device == device), None)

    @classmethod
    def probe(cls, root: Path = Path("/")) -> Machine:
        """Look at this machine; `root` holds the proc and sys trees.

        Effects: imports torch when an NVIDIA driver is present, and then makes a CUDA context on each GPU.
        Raises: HardwareError: /proc/meminfo cannot be read.
        """
        memory, available = host_memory(root)
        cpus = os.sched_getaffinity(0)
        cores, quota = physical_cores(root, cpus), cgroup_cpu_limit(root)
        gpus, note = _probe_gpus(root)
        return cls(
            memory,
            available,
            # Threads beyond the quota would be throttled.
            cores=max(1, len(cores) if quota is None else min(len(cores), int(quota))),
            gpus=gpus,
            gpu_note=note,
            core_cpus=cores,
            nodes=host_nodes(root, cpus),
            cpu_quota=quota is not None,
            numa_balancing=numa_balancing(root),
        )


def _probe_gpus(root: Path) -> tuple[tuple[Gpu, ...], str]:
    """Ask torch for the GPUs, but only when an NVIDIA driver is there: importing torch takes seconds."""
    if not (root / "proc/driver/nvidia/version").exists() and not _driver_library_loads():
        return (), NO_DRIVER
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch = importlib.import_module("torch")
            gpus = tuple(_describe_gpu(torch, index) for index in range(torch.cuda.device_count()))
        except (ImportError, RuntimeError, AssertionError) as error:  # what torch raises for a driver that fails
            return (), f"torch cannot use the NVIDIA driver: {_first_line(error)}"
    if gpus:
        return gpus, ""
    if torch.version.cuda is None:
        return (), f"an NVIDIA driver is present, but torch {torch.__version__} is built without CUDA"
    reason = _first_line(caught[-1].message) if caught else "torch sees no GPU"
    return (), f"an NVIDIA driver is present, but {reason}"


def _driver_library_loads() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _describe_gpu(torch: Any, index: int) -> Gpu:
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(index, torch.cuda.get_device_name(index), int(total_bytes), int(free_bytes), (int(major), int(minor)))


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]

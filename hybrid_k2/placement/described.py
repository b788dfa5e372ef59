"""The machine that a plan is made for without loading: this one, and what is not here as it is described."""

from __future__ import annotations

from dataclasses import replace

from hybrid_k2.placement.form import Rules
from hybrid_k2.placement.machine import Gpu, Machine
from hybrid_k2.placement.memories import TWIN
from hybrid_k2.placement.sizes import format_bytes


def described_host(machine: Machine, memory_bytes: int | None) -> Machine:
    """Give the host so much free memory, whatever this one has; its notes say so. None: leave it as it is."""
    if memory_bytes is None:
        return machine
    here = format_bytes(machine.host_available_bytes)
    note = f"host: planned for {format_bytes(memory_bytes)} of free memory; here are {here}"
    return replace(
        machine,
        host_memory_bytes=memory_bytes,
        host_available_bytes=memory_bytes,
        nodes=(),  # how that host's memory is divided is not known
        notes=(*machine.notes, note),
    )


def described_gpu(machine: Machine, rules: Rules) -> Machine:
    """Add the GPU that the rules name and size (`devices.gpu_memory`) where it is missing; its notes say so."""
    device, size = rules.devices.gpu, rules.devices.gpu_memory_bytes
    if device is None or device == TWIN or size is None or machine.find_gpu(device) is not None:
        return machine
    found = ", ".join(gpu.device for gpu in machine.gpus) or machine.gpu_note or "no GPU"
    note = f"{device}: no such GPU is here ({found}); planned for a card of {format_bytes(size)}"
    gpu = Gpu(int(device.removeprefix("cuda:")), "as described", size)
    return replace(machine, gpus=(*machine.gpus, gpu), notes=(*machine.notes, note))

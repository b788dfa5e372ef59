"""What torch and Triton make of the GPUs, and a real kernel on each, beside torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hybrid_k2.accelerator.kernels import have_triton
from hybrid_k2.cli.doctor.finding import FAILED, OK, WARNING, Finding
from hybrid_k2.dense import quantize_int8
from hybrid_k2.placement import Machine
from hybrid_k2.placement.machine import NO_DRIVER
from hybrid_k2.placement.sizes import format_bytes

ROWS, INPUTS, TOKENS = 96, 160, 5
SUMS = 2.0**-16  # of the sum of magnitudes: sums in fp32, and the low half of fp32 inputs


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """Name each GPU as torch sees it, and run a kernel there; without one, say why."""
    if not machine.gpus:
        text = f"none ({machine.gpu_note}): everything runs on the host"
        if machine.gpu_note == NO_DRIVER:
            yield Finding("gpu", OK, text)
        else:
            yield Finding("gpu", WARNING, text, "install a build of torch for this driver's CUDA: https://pytorch.org")
    for gpu in machine.gpus:
        capability = "" if gpu.capability is None else f", compute capability {'.'.join(map(str, gpu.capability))}"
        memory = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.memory_bytes)} free"
        text = f"{gpu.device}: {gpu.name}, {memory}{capability}; torch for CUDA {torch.version.cuda}"
        yield Finding("gpu", OK, text)
        yield from check_kernel(torch.device(gpu.device))


def check_kernel(device: torch.device) -> Iterator[Finding]:
    """Multiply by a small int8 matrix on a device and compare with torch in float64 on the host."""
    if not have_triton():
        yield Finding(
            "gpu kernels",
            WARNING,
            "triton is missing: torch computes on the GPU, slower, without int8, hot and streamed experts and graphs",
            "pip install 'hybrid-k2[gpu]'",
        )
        return
    from hybrid_k2.accelerator.kernels.weight_only import WeightOnly, from_int8, weight_only_linear

    random = torch.Generator().manual_seed(0)
    weight = from_int8(quantize_int8(torch.randn(ROWS, INPUTS, generator=random)))
    x = torch.randn(TOKENS, INPUTS, generator=random)
    there = WeightOnly(weight.values.to(device), weight.scales.to(device))
    result = weight_only_linear(x.to(device), there).cpu().double()
    plain = weight.dequantize().double()
    bound = x.double().abs() @ plain.abs().T * SUMS
    worst = float(((result - x.double() @ plain.T).abs() / bound).max())
    if worst <= 1:
        yield Finding("gpu kernels", OK, f"a Triton kernel on {device} computes as torch does")
    else:
        text = f"a Triton kernel on {device}: expected what torch computes, got {worst:.1e} times the rounding off"
        yield Finding("gpu kernels", FAILED, text, "update the driver, torch and triton")

"""The small parts that several blocks share: linear, RMSNorm, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

WIDENED_NUMBERS = 1 << 20  # 4 MiB in fp32: stays in a CPU's caches, and is work for many threads


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows with a weight, on the weight's device.

    Computed in the weight's dtype, but for fp32 rows on the host: there a bf16 weight is widened, which is exact, so
    that bf16 saves memory and costs no accuracy. Every dense product but those inside attention and the router passes
    here.
    Shapes: x [T, in], weight [out, in] -> [T, out].
    """
    if weight.device.type == "cpu" and x.dtype == torch.float32 and weight.dtype == torch.bfloat16:
        return _linear_widened(x.to(weight.device), weight)
    return functional.linear(x.to(weight), weight)


def _linear_widened(x: Tensor, weight: Tensor) -> Tensor:
    """Widen a few output rows of the weight at a time: torch's products of bf16 are slow where the CPU has none."""
    step = max(1, WIDENED_NUMBERS // weight.shape[1])
    if len(weight) <= step:
        return functional.linear(x, weight.float())
    out = x.new_empty(len(x), len(weight))  # [T, out]
    for columns, rows in zip(torch.split(out, step, dim=1), torch.split(weight, step), strict=True):
        columns.copy_(functional.linear(x, rows.float()))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide rows by their root mean square, with statistics in fp32, and multiply with the weight in x's dtype.

    Shapes: x [T, n], weight [n] -> [T, n] in x's dtype.
    Source: the order of the casts is the original model code's.
    """
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight.to(x)


@dataclass(frozen=True)
class RmsNorm:
    """Hold one norm's weight and epsilon."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x.to(self.weight.device), self.weight, self.eps)


@dataclass(frozen=True)
class SwiGlu:
    """Compute down(silu(gate(x)) * up(x)).

    Shapes: gate, up [inner, hidden]; down [hidden, inner]; x [T, hidden] -> [T, hidden].
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.gate.device)
        inner = functional.silu(linear(x, self.gate)) * linear(x, self.up)  # [T, inner]
        return linear(inner, self.down)

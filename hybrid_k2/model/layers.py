"""The small parts that several blocks share: linear, RMSNorm, SwiGLU, embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows with a weight, on the weight's device and in its dtype.

    Every dense product of the model but those inside attention and the router passes here.
    Shapes: x [T, in], weight [out, in] -> [T, out].
    """
    return functional.linear(x.to(weight), weight)


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
        x = x.to(self.gate)
        inner = functional.silu(linear(x, self.gate)) * linear(x, self.up)  # [T, inner]
        return linear(inner, self.down)

"""Numerics bf16 in plain float64: what the kernels must compute, but for the rounding of their fp32 sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from hybrid_k2.checkpoint import ExpertWeights, PackedWeight

GROUP = 32
LARGEST = 32512  # of the integers that stand for a group's activations
LEAST_EXPONENT = -59


def fixed_point(x: Tensor) -> Tensor:
    """Round each group of 32 to integers times 2^k, with the least k for which its largest magnitude fits.

    Shapes: x [T, n] float64 -> [T, n] float64.
    """
    groups = x.unflatten(-1, (-1, GROUP))  # [T, n/32, 32]
    largest = groups.abs().amax(-1, keepdim=True)  # [T, n/32, 1]
    k = torch.ceil(torch.log2(largest / LARGEST)).clamp(min=LEAST_EXPONENT)
    return ((groups * 2.0**-k).round() * 2.0**k).flatten(-2)  # [T, n]


def bf16_expert(weights: ExpertWeights, hidden: Tensor) -> Tensor:
    """Compute one expert: hidden states rounded to bf16, the intermediate to 16 bits, weights as they are.

    Shapes: hidden [T, H] bf16 or fp32 -> [T, H] float64.
    """
    gate_weight, up_weight, down_weight = (_float64(getattr(weights, name)) for name in ("gate", "up", "down"))
    x = fixed_point(hidden.to(torch.bfloat16).to(torch.float64))  # [T, H]
    h = silu(x @ gate_weight.T) * (x @ up_weight.T)  # [T, I]
    return fixed_point(h) @ down_weight.T  # [T, H]


def bf16_layer(experts: list[ExpertWeights], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Add up the chosen experts.

    Shapes: hidden [T, H], ids and weights [T, K] -> [T, H] float64.
    """
    out = torch.zeros(hidden.shape, dtype=torch.float64)  # [T, H]
    for number, expert in enumerate(experts):
        factor = (weights * (ids == number)).sum(1, keepdim=True).to(torch.float64)  # [T, 1]
        out += factor * bf16_expert(expert, hidden)
    return out


def _float64(weight: PackedWeight | Tensor) -> Tensor:
    return weight.dequantize(torch.float64) if isinstance(weight, PackedWeight) else weight.to(torch.float64)

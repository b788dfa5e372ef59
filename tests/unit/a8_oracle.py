"""Numerics fast in plain torch: what the kernels must compute, but for the rounding of their fp32 sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from hybrid_k2.checkpoint import ExpertWeights, PackedWeight

GROUP = 32
LARGEST = 127  # of the integers that stand for a group's activations
LEAST = 2.0**-61  # a group whose largest magnitude is below is zero


def eight_bits(x: Tensor) -> Tensor:
    """Round each group of 32 to integers times a 127th of its largest magnitude.

    The integers are those of the kernels: multiplied with an fp32 inverse, in fp32, a half goes to the even neighbour.
    Shapes: x [T, n] -> [T, n] float64.
    """
    groups = x.to(torch.float32).unflatten(-1, (-1, GROUP))  # [T, n/32, 32]
    largest = groups.abs().amax(-1, keepdim=True)  # [T, n/32, 1]
    zero = largest < LEAST
    integers = torch.where(zero, 0.0, groups * (LARGEST / torch.where(zero, 1.0, largest))).round()
    return (integers.to(torch.float64) * (largest / LARGEST)).flatten(-2)  # [T, n]


def a8_expert(weights: ExpertWeights, hidden: Tensor) -> Tensor:
    """Compute one expert: hidden states and the intermediate rounded to 8 bits, weights as they are.

    Shapes: hidden [T, H] bf16 or fp32 -> [T, H] float64.
    """
    gate_weight, up_weight, down_weight = (_float64(getattr(weights, name)) for name in ("gate", "up", "down"))
    x = eight_bits(hidden)  # [T, H]
    h = silu(x @ gate_weight.T) * (x @ up_weight.T)  # [T, I]
    return eight_bits(h) @ down_weight.T  # [T, H]


def a8_layer(experts: list[ExpertWeights], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Add up the chosen experts.

    Shapes: hidden [T, H], ids and weights [T, K] -> [T, H] float64.
    """
    out = torch.zeros(hidden.shape, dtype=torch.float64)  # [T, H]
    for number, expert in enumerate(experts):
        factor = (weights * (ids == number)).sum(1, keepdim=True).to(torch.float64)  # [T, 1]
        out += factor * a8_expert(expert, hidden)
    return out


def _float64(weight: PackedWeight | Tensor) -> Tensor:
    return weight.dequantize(torch.float64) if isinstance(weight, PackedWeight) else weight.to(torch.float64)

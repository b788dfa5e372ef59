"""How far two correct computations of a part of the model may be apart.

Both round, in other places and to other dtypes. What comes of it depends on weights and inputs: sums that cancel and
softmax over large scores make much of little. So it is measured on the part itself: the fp32 reference is computed once
more with its weights shaken, each by as much as the roundings amount to. Rounding what enters a product, its weights or
what it adds up moves the result by as much as shaking the weights does, for the errors of many numbers are independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

# Relative errors of one rounding. bf16: half a unit in the last of 8 bits; fp8 (e4m3): in the last of 4. int8: a group
# of 32 shares a scale of its largest magnitude / 127, an error has a standard deviation of 1 / sqrt(12) of that, and it
# is largest beside the group's root mean square where one weight is all of it.
ROUNDING = {"bf16": 2.0**-9, "int8": math.sqrt(32) / (127 * math.sqrt(12)), "fp8": 2.0**-4, "fp32": 0.0, "int4": 0.0}
# Sums of n products in fp32, in any order: 2^-24 * sqrt(n) of their size, for n up to 2^14.
SUMS = 2.0**-17
# The errors of a whole expert that the numerics are documented with (docs/kernels.md).
NUMERICS = {"exact": 1e-4, "bf16": 3e-3, "fast": 2e-2, "reference": 0.0}
# A product of the path rounds inputs, weights and results, where shaking counts the largest of them once: sqrt(3). The
# rest is for chance: how one draw of errors differs from another.
FACTOR = 4.0
PIECE = 1 << 24  # weights shaken at a time


@dataclass(frozen=True)
class Difference:
    """What a part's worst row differs by, and what it may, both as parts of the row."""

    error: float
    bound: float

    @property
    def share(self) -> float:
        """The part of the bound that is used up; above one, or not a number, means a disagreement."""
        return 0.0 if self.error == 0 else self.error / self.bound if self.bound else math.inf

    @property
    def within(self) -> bool:
        """Say whether rounding explains it."""
        return self.share <= 1


def combined(*errors: float) -> float:
    """Return the size of independent errors together."""
    return math.sqrt(sum(error * error for error in (*errors, SUMS)))


def shake(part: object, amplitude: float, random: torch.Generator) -> None:
    """Change the weights of a part by this relative amount, up or down by chance; norms and matrices, not biases.

    A matrix's signs are those of its rows times those of its columns: as good as any for the sums of a row, and cheap.
    Effects: changes the tensors in `part`, a tensor or a dataclass that holds some.
    """
    if isinstance(part, Tensor):
        if part.dim() == 1:
            part.mul_(1 + amplitude * _signs(len(part), random))
            return
        columns, rows = amplitude * _signs(part.shape[1], random), _signs(len(part), random)
        step = max(1, PIECE // part.shape[1])
        for first in range(0, len(part), step):
            piece = slice(first, first + step)
            part[piece].mul_(torch.outer(rows[piece], columns).add_(1))
    elif is_dataclass(part):
        for field in fields(part):
            shake(getattr(part, field.name), amplitude, random)


def difference(got: Tensor, expected: Tensor, shaken: Tensor) -> Difference:
    """Compare rows with the reference, and with what shaking does to it.

    Shapes: [T, n] each.
    """
    error = (got - expected).norm(dim=1)  # [T]
    sway = (shaken - expected).norm(dim=1)  # [T]
    limit = FACTOR * torch.maximum(sway, sway.square().mean().sqrt())  # [T]
    share = torch.where(error == 0, 0.0, error / limit).nan_to_num(nan=torch.inf)  # [T]
    worst = int(share.argmax())
    size = max(float(expected[worst].norm()), torch.finfo(torch.float32).tiny)
    return Difference(float(error[worst]) / size, float(limit[worst]) / size)


def _signs(count: int, random: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=random).mul_(2).sub_(1).float()

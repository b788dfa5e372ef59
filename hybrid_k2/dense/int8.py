"""Weight-only int8 in plain torch: the definition that the native packer and kernels are tested against.

A group of 32 inputs of one row shares a scale: its largest magnitude / 127 in bf16. A value is weight / scale, rounded
to nearest even and cut to -127..127: 8.5 bits per weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_k2.errors import CheckpointError

GROUP = 32
BLOCK_ROWS = 32  # the native kernels compute so many rows at once
LARGEST = 127
TOO_LARGE = 127 * 255.5  # its scale rounds to 256 in bf16, and scales are below that, see csrc/kernels/a16.h
SMALLEST_SCALE = 2.0**-126  # below it, a group counts as zero: at most 1.5e-36


def fits_blocks(rows: int, inputs: int) -> bool:
    """Say whether a matrix consists of whole blocks of 32 rows by 32 inputs, as int8 and the native kernels need."""
    return rows > 0 and inputs > 0 and rows % BLOCK_ROWS == 0 and inputs % GROUP == 0


@dataclass(frozen=True)
class Int8Weight:
    """Hold a matrix as `values * scale`.

    Shapes: values int8 [out, in], scale bf16 [out, in / 32].
    """

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """Rows and inputs."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.values.device

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """Return these rows in fp32, which is exact.

        Shapes: -> [n, in] fp32.
        """
        values, scale = self.values[rows].float(), self.scale[rows].float()
        return (values.view(len(values), -1, GROUP) * scale.unsqueeze(-1)).view(values.shape)


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Bring a matrix into int8.

    Shapes: weight [out, in].
    Raises: ValueError unless inputs come in whole groups; CheckpointError, naming its place, for a value that is
    not finite or too large.
    """
    rows, inputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"weight: expected a multiple of {GROUP} inputs, got {inputs}")
    groups = weight.float().view(rows, inputs // GROUP, GROUP)
    largest = groups.abs().amax(-1)  # [out, in / 32]; NaN where there is one
    if not bool((largest < TOO_LARGE).all()):
        row, column = (~(weight.abs() < TOO_LARGE)).nonzero()[0].tolist()
        raise CheckpointError(
            f"weight: expected finite values below {TOO_LARGE} for int8, "
            f"got {float(weight[row, column])} at row {row}, input {column}"
        )
    scale = (largest / LARGEST).bfloat16()
    scale = torch.where(scale.float() < SMALLEST_SCALE, torch.zeros_like(scale), scale)
    divisor = torch.where(scale == 0, torch.full_like(largest, torch.inf), scale.float())
    values = (groups / divisor.unsqueeze(-1)).round().clamp(-LARGEST, LARGEST)
    return Int8Weight(values.to(torch.int8).view(rows, inputs), scale)

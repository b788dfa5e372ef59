"""A dense matrix on a GPU in int8 or fp8, multiplied by the Triton kernels; never run on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybrid_k2.accelerator.kernels import have_triton
from hybrid_k2.dense import quantize_int8
from hybrid_k2.errors import HardwareError

if TYPE_CHECKING:
    from hybrid_k2.accelerator.kernels.weight_only import WeightOnly

BLOCK = 32
# Up to here a weight's bytes cost more than its products, and the exact form is as fast as they come. Never timed.
DECODE_ROWS = 32


def check_kernels(dtype: str, device: str) -> None:
    """Check that there are kernels for such a matrix. Raises: HardwareError without triton."""
    if not have_triton():
        raise HardwareError(
            f"{dtype} on {device}: expected triton, whose kernels multiply it, got none installed",
            hint="pip install 'hybrid-k2[gpu]', or write bf16 in the placement rules",
        )


class GpuMatrix:
    """Hold a matrix [out, in] of whole blocks of 32 by 32, and multiply rows with it.

    Few rows are multiplied exactly, many with weights rounded to bf16 (see docs/gpu-kernels.md); so a row's last bits
    depend on how many there are.
    """

    def __init__(self, rows: int, inputs: int, dtype: str, device: torch.device) -> None:
        """Take memory for it.

        dtype: "int8" or "fp8".
        Raises: HardwareError without triton; torch.OutOfMemoryError.
        """
        check_kernels(dtype, str(device))
        from hybrid_k2.accelerator.kernels.weight_only import WeightOnly

        self.dtype = dtype
        blocks = (rows // BLOCK, inputs // BLOCK)
        kind = torch.int8 if dtype == "int8" else torch.float8_e4m3fn
        values = torch.empty(*blocks, BLOCK, BLOCK, dtype=kind, device=device)
        if dtype == "int8":
            scales = torch.empty(*blocks, BLOCK, dtype=torch.bfloat16, device=device)
        else:
            scales = torch.empty(rows, dtype=torch.float32, device=device)
        self.weight = WeightOnly(values, scales)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.weight.values.device

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and inputs."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU."""
        return self.weight.nbytes

    def load_rows(self, first: int, rows: Tensor) -> None:
        """Quantise rows and put them from row `first` on; whole blocks of 32 rows, the same numbers as on the host.

        Raises: CheckpointError for values that int8 cannot hold; ValueError for ones that fp8 cannot.
        """
        piece = self._quantised(rows.to(self.device))
        last = first + len(rows)
        self.weight.values[first // BLOCK : last // BLOCK] = piece.values
        if self.dtype == "int8":
            self.weight.scales[first // BLOCK : last // BLOCK] = piece.scales
        else:
            self.weight.scales[first:last] = piece.scales

    def _quantised(self, rows: Tensor) -> WeightOnly:
        from hybrid_k2.accelerator.kernels.weight_only import from_int8, quantize_fp8

        return from_int8(quantize_int8(rows)) if self.dtype == "int8" else quantize_fp8(rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply rows.

        Shapes: x [T, in], bf16 or fp32 -> [T, out] in x's dtype, on the GPU.
        """
        from hybrid_k2.accelerator.kernels.weight_only import DECODE, PREFILL, weight_only_linear

        x = x.to(self.device)
        return weight_only_linear(x, self.weight, DECODE if len(x) <= DECODE_ROWS else PREFILL)

"""Read the matrix of a linear layer straight into its final form: pieces of rows, rounded or quantised on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.accelerator.gpu_matrix import GpuMatrix
from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.dense import HostMatrix, Int8Weight, fits_blocks, quantize_int8
from hybrid_k2.errors import CheckpointError
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.model.room import room_for

if TYPE_CHECKING:
    from hybrid_k2.placement.plan import Placement

PIECE_BYTES = 16 << 20  # read and packed at a time: large reads, and little beside the plan


def load_host_matrix(
    checkpoint: Checkpoint, prefix: str, placement: Placement, runtime: ExpertsRuntime, count: Callable[[int], None]
) -> HostMatrix | Int8Weight | None:
    """Load `prefix.weight` as bf16 or int8 on the host; None if it is to stay a plain tensor.

    That is so on a GPU, in fp32, for sizes that are not multiples of 32, and for bf16 without the native kernels.
    Effects: calls `count` with the bytes on disk of each piece.
    Raises: CheckpointError naming tensor and file; MemoryBudgetError.
    """
    rows, inputs = checkpoint.linear_shape(prefix)
    if placement.memory != "host" or placement.dtype not in ("bf16", "int8") or not fits_blocks(rows, inputs):
        return None
    if runtime.native is None and placement.dtype == "bf16":
        return None
    try:
        with room_for(prefix, placement.device):
            if runtime.native is None:
                weight = quantize_int8(checkpoint.read_linear(prefix))
                count(checkpoint.linear_bytes(prefix))
                return weight
            matrix = HostMatrix(runtime.native, rows, inputs, placement.dtype)
            for first, piece, nbytes in _pieces(checkpoint, prefix, rows):
                matrix.load_rows(first, piece)
                count(nbytes)
            return matrix
    except CheckpointError as error:
        raise _named(error, checkpoint, prefix) from None


def load_gpu_matrix(
    checkpoint: Checkpoint, prefix: str, placement: Placement, device: torch.device, count: Callable[[int], None]
) -> GpuMatrix | None:
    """Load `prefix.weight` as int8 or fp8 on a GPU; None if it is to stay a plain tensor.

    That is so on the host, in other dtypes, and for sizes that are not multiples of 32.
    Effects: calls `count` with the bytes on disk of each piece.
    Raises: CheckpointError naming tensor and file; MemoryBudgetError; HardwareError without triton.
    """
    rows, inputs = checkpoint.linear_shape(prefix)
    if placement.memory == "host" or placement.dtype not in ("int8", "fp8") or not fits_blocks(rows, inputs):
        return None
    try:
        with room_for(prefix, placement.device):
            matrix = GpuMatrix(rows, inputs, placement.dtype, device)
            for first, piece, nbytes in _pieces(checkpoint, prefix, rows):
                matrix.load_rows(first, piece)
                count(nbytes)
            return matrix
    except ValueError as error:  # fp8 cannot hold it
        raise _named(CheckpointError(str(error)), checkpoint, prefix) from None
    except CheckpointError as error:
        raise _named(error, checkpoint, prefix) from None


def _named(error: CheckpointError, checkpoint: Checkpoint, prefix: str) -> CheckpointError:
    """Name tensor and file in an error of quantising, which knows no names."""
    if prefix in error.message:
        return error
    return CheckpointError(f"{prefix}.{error.message} (in {checkpoint.linear_file(prefix).name})", hint=error.hint)


def load_padded(
    checkpoint: Checkpoint, prefix: str, placement: Placement, runtime: ExpertsRuntime, count: Callable[[int], None]
) -> HostMatrix | None:
    """Load a matrix in bf16 for the native kernels, in whole blocks of 32 rows; None if it stays a plain tensor.

    That is so on a GPU, without the native kernels, and where it is not kept or not stored in bf16: the kernels
    multiply fp32 rows with bf16 weights. What it multiplies has columns behind those of its own rows, which are zero.

    Effects: calls `count` with the bytes on disk.
    Raises: CheckpointError naming tensor and file; MemoryBudgetError.
    """
    rows, inputs = checkpoint.linear_shape(prefix)
    padded = -(-rows // 32) * 32
    native = runtime.native is not None and placement.memory == "host" and fits_blocks(padded, inputs)
    stored = checkpoint.has(f"{prefix}.weight") and checkpoint.info(f"{prefix}.weight").dtype == "BF16"
    if not native or placement.dtype != "bf16" or not stored:
        return None
    with room_for(prefix, placement.device):
        matrix = HostMatrix(runtime.native, padded, inputs, "bf16")
        matrix.load_rows(0, functional.pad(checkpoint.read(f"{prefix}.weight"), (0, 0, 0, padded - rows)))
    count(checkpoint.linear_bytes(prefix))
    return matrix


def _pieces(checkpoint: Checkpoint, prefix: str, rows: int) -> Iterator[tuple[int, Tensor, int]]:
    """Yield the first row, the rows, and their bytes on disk."""
    if not checkpoint.has(f"{prefix}.weight"):
        yield 0, checkpoint.read_linear(prefix), checkpoint.linear_bytes(prefix)
        return
    name = f"{prefix}.weight"
    nbytes = checkpoint.info(name).nbytes
    step = max(32, PIECE_BYTES * rows // nbytes // 32 * 32)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield first, checkpoint.read_rows(name, first, last), nbytes // rows * (last - first)

"""Matrices of dense layers in the form of the native kernels; see docs/kernels.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_k2.dense.int8 import Int8Weight
from hybrid_k2.host.binding import warn_unbound
from hybrid_k2.native import native

DTYPES = ("bf16", "int8")


class HostMatrix:
    """Hold a matrix [out, in] in bf16 or int8 and multiply rows with it, on the threads of the experts' runtime.

    Products add in fp32. A row's result depends on that row alone, bit for bit: not on the other rows of the batch, the
    number of threads or the instruction set. bf16 follows IEEE arithmetic; with int8, a row that holds a NaN, an
    infinity or a magnitude above 3.7e22 gives NaN.
    """

    device = torch.device("cpu")

    def __init__(self, runtime: Any, rows: int, inputs: int, dtype: str) -> None:
        """Allocate it, to be filled by `load_rows`; `runtime` is `ExpertsRuntime.native`.

        Raises: ValueError for sizes that are not multiples of 32 or another dtype; MemoryError.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        self.shape = torch.Size((rows, inputs))
        self.dtype = dtype
        self.runtime = runtime
        self._matrix = native.DenseMatrix(runtime, rows, inputs, dtype == "int8")
        if not self.bound:
            warn_unbound()

    @property
    def native(self) -> Any:
        """The extension's matrix."""
        return self._matrix

    @property
    def bound(self) -> bool:
        """Whether each node's rows are in its own memory, as its threads were spread; True where they were not."""
        return bool(self._matrix.bound)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the weights take."""
        return int(self._matrix.nbytes)

    def load_rows(self, first: int, rows: Tensor) -> None:
        """Round, or quantise as `quantize_int8` does, and pack these rows; both ends at multiples of 32 rows.

        Shapes: rows [n, in], bf16 or any dtype that fp32 holds.
        Raises: ValueError for rows that do not fit; CheckpointError for a value that int8 cannot hold.
        """
        plain = rows if rows.dtype == torch.bfloat16 else rows.float()
        plain = plain.contiguous()
        self._matrix.load_rows(first, (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy())

    def read(self) -> Tensor | Int8Weight:
        """Return the matrix as it is kept: bf16 [out, in], or int8."""
        if self.dtype == "bf16":
            return torch.from_numpy(self._matrix.read()).view(torch.bfloat16)
        values, scale = map(torch.from_numpy, self._matrix.read())
        return Int8Weight(values, scale.view(torch.bfloat16))

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply rows.

        Shapes: x [T, in] -> [T, out] in x's dtype.
        """
        rows, out = as_rows(x), torch.empty(len(x), self.shape[0])
        self._matrix.multiply(rows.numpy(), out.numpy())
        return out.to(x.dtype)

    def close(self) -> None:
        """Release the memory; the matrix cannot be used any more."""
        self._matrix.close()


def multiply_all(matrices: Sequence[HostMatrix], x: Tensor) -> list[Tensor]:
    """Multiply rows with several matrices of one dtype and runtime at once: the threads are asked once.

    Shapes: x [T, in] -> [T, out] for each, in x's dtype.
    """
    outputs = [torch.empty(len(x), matrix.shape[0]) for matrix in matrices]
    native.multiply_all([matrix._matrix for matrix in matrices], as_rows(x).numpy(), [out.numpy() for out in outputs])
    return [out.to(x.dtype) for out in outputs]


def as_rows(x: Tensor) -> Tensor:
    """Return rows as the kernels read them: fp32, contiguous, on the host."""
    return x.detach().to("cpu", torch.float32).contiguous()

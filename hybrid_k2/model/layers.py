"""The small parts that several blocks share: linear, RMSNorm, SwiGLU.

The matrix of a linear layer is a torch tensor; or one of the host's own forms, `HostMatrix` on the native kernels and
`Int8Weight` where there are none; or a `GpuMatrix`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.accelerator.gpu_matrix import GpuMatrix
from hybrid_k2.dense import HostMatrix, Int8Weight, multiply_all
from hybrid_k2.model import host_rows

Matrix = Tensor | HostMatrix | Int8Weight | GpuMatrix
WIDENED_NUMBERS = 1 << 20  # 4 MiB in fp32: stays in a CPU's caches, and is work for many threads
UNSPLIT_NUMBERS = 1 << 15  # torch gives an elementwise function of no more numbers to one thread
VECTOR_BYTES = 128  # a multiple of what torch computes at once, on every CPU


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """Multiply rows with a weight, on the weight's device.

    Computed in the weight's dtype, but for fp32 rows on the host: there a bf16 weight is widened, which is exact, so
    that bf16 saves memory and costs no accuracy. The other forms add in fp32 and give x's dtype. Every dense
    product but those inside attention and the router passes here.
    Shapes: x [T, in], weight [out, in] -> [T, out].
    """
    if isinstance(weight, (HostMatrix, GpuMatrix)):
        return weight(x)
    if isinstance(weight, Int8Weight):
        return _linear_widened(x.to(weight.device, torch.float32), weight).to(x.dtype)
    if weight.device.type == "cpu" and x.dtype == torch.float32 and weight.dtype == torch.bfloat16:
        return _linear_widened(x.to(weight.device), weight)
    return functional.linear(x.to(weight), weight)


def linear_all(x: Tensor, weights: Sequence[Matrix]) -> list[Tensor]:
    """Multiply rows with several weights; native ones in one go where they can be.

    Shapes: x [T, in], weights [out, in] each -> [T, out] each.
    """
    if native := native_of_one_kind(weights):
        return multiply_all(native, x)
    return [linear(x, weight) for weight in weights]


def native_of_one_kind(weights: Sequence[Matrix]) -> list[HostMatrix]:
    """Return the weights if they are native ones that can be multiplied in one go, else none."""
    native = [weight for weight in weights if isinstance(weight, HostMatrix)]
    one_kind = len({(weight.dtype, id(weight.runtime)) for weight in native}) == 1
    return native if one_kind and len(native) == len(weights) else []


def rowwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an elementwise function of torch so that a row's bits depend on that row alone, on the host.

    Torch computes whole vectors with other code than the numbers that are left over at the end of a thread's part, and
    the two differ in the last bit. So rows are padded to whole vectors, and no more of them go in at once than one
    thread takes.
    Shapes: x [T, n] -> [T, n].
    """
    width = x.shape[1]
    if x.device.type != "cpu":
        return function(x)
    if rest := -width % (VECTOR_BYTES // x.element_size()):
        return rowwise(function, functional.pad(x, (0, rest)))[:, :width].contiguous()
    if x.numel() <= UNSPLIT_NUMBERS:
        return function(x.contiguous())
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = max(1, UNSPLIT_NUMBERS // width)
    for first in range(0, len(x), step):
        out[first : first + step] = function(x[first : first + step].contiguous())
    return out


def _linear_widened(x: Tensor, weight: Tensor | Int8Weight) -> Tensor:
    """Widen a few output rows of the weight at a time: torch's products of bf16 are slow where the CPU has none."""
    count, inputs = weight.shape
    step = max(1, WIDENED_NUMBERS // inputs)
    if count <= step:
        return functional.linear(x, _widened(weight, slice(None)))
    out = x.new_empty(len(x), count)  # [T, out]
    for first in range(0, count, step):
        rows = slice(first, first + step)
        out[:, rows] = functional.linear(x, _widened(weight, rows))
    return out


def _widened(weight: Tensor | Int8Weight, rows: slice) -> Tensor:
    return weight.dequantize(rows) if isinstance(weight, Int8Weight) else weight[rows].float()


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
    """Hold one norm's weight and epsilon.

    `kernel`: in one launch by Triton's, `threads`: natively where rows are fp32 on the host (`host_rows`); both are the
    same but for the last bits.
    """

    weight: Tensor
    eps: float
    kernel: bool = False
    threads: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.device)
        if self.kernel:
            from hybrid_k2.accelerator.kernels.norm_rope import rms_norm as launch

            return launch(x, self.weight, self.eps)
        if self.threads is not None and host_rows.on_host(x):
            return host_rows.rms_norm(self.threads, x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class SwiGlu:
    """Compute down(silu(gate(x)) * up(x)).

    Shapes: gate, up [inner, hidden]; down [hidden, inner]; x [T, hidden] -> [T, hidden].
    """

    gate: Matrix
    up: Matrix
    down: Matrix

    @property
    def any_batch(self) -> bool:
        """Whether a row has the same bits whatever other rows there are."""
        return all(isinstance(matrix, HostMatrix) for matrix in (self.gate, self.up, self.down))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.gate.device)
        return self.finish(*linear_all(x, (self.gate, self.up)))

    def finish(self, gate: Tensor, up: Tensor) -> Tensor:
        """Compute what follows the products with gate and up.

        Shapes: gate, up [T, inner] -> [T, hidden].
        """
        if isinstance(self.down, HostMatrix) and host_rows.on_host(gate, up):
            return self.down(host_rows.silu_times(self.down.runtime, gate, up))
        return linear(rowwise(functional.silu, gate) * up, self.down)

"""The experts in numba: what runs where the native extension could not be built.

FP32 on the checkpoint's own packing. Each row of weights is unpacked once per call and multiplied with every token that
the expert got; the sum over the inputs has one fixed order, so a token's result does not depend on its batch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid_k2.checkpoint import ExpertWeights, PackedWeight
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.base import ExpertsBackend, ExpertsRuntime, ExpertsShape, QueuedBackend, distinct_experts
from hybrid_k2.experts.reference import measure_torch_read_gbps

# Sums may be split over lanes and products fused; NaN and infinity keep their meaning.
FASTMATH = {"reassoc", "contract", "nsz"}
ROWS_PER_TASK = 16


def _matmul(packed: NDArray[Any], scale: NDArray[Any], x: NDArray[Any], y: NDArray[Any]) -> None:
    """y[n, out] = x[n, in] @ dequantised(packed uint8 [out, in/2], scale fp32 [out, in/32]).T

    x holds the even inputs before the odd ones, as the low nibbles of a row before its high ones: each loop below then
    runs over neighbours and becomes vector instructions.
    """
    rows, groups = scale.shape
    half = groups * 16
    for task in numba.prange((rows + ROWS_PER_TASK - 1) // ROWS_PER_TASK):
        weights = np.empty(2 * half, np.float32)
        for row in range(task * ROWS_PER_TASK, min((task + 1) * ROWS_PER_TASK, rows)):
            pairs = packed[row]
            for i in range(half):
                weights[i] = np.float32(np.int32(pairs[i]) & np.int32(15)) - np.float32(8)
            for i in range(half):
                weights[half + i] = np.float32(np.int32(pairs[i]) >> np.int32(4)) - np.float32(8)
            for group in range(groups):
                factor = scale[row, group]
                for i in range(group * 16, group * 16 + 16):
                    weights[i] *= factor
                for i in range(half + group * 16, half + group * 16 + 16):
                    weights[i] *= factor
            for n in range(x.shape[0]):
                total = np.float32(0)
                for i in range(2 * half):
                    total += weights[i] * x[n, i]
                y[n, row] = total


_matmul_parallel = numba.njit(parallel=True, fastmath=FASTMATH)(_matmul)


class _Matrix:
    """One packed matrix as numpy sees it: words as bytes, scales in fp32."""

    def __init__(self, weight: PackedWeight) -> None:
        self.packed: NDArray[Any] = weight.packed.contiguous().view(torch.uint8).numpy()  # [out, in/2]
        self.scale: NDArray[Any] = weight.scale.to(torch.float32).contiguous().numpy()  # [out, in/32]
        self.nbytes = self.packed.nbytes + self.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(x.shape[0], self.packed.shape[0])
        even_odd = x.reshape(x.shape[0], x.shape[1] // 2, 2).transpose(1, 2).flatten(1).contiguous()  # [n, in]
        _matmul_parallel(self.packed, self.scale, even_odd.numpy(), y.numpy())
        return y


class NumbaExperts(QueuedBackend):
    """Compute a layer expert by expert, in ascending order; rows of weights are spread over the threads."""

    def __init__(self, shape: ExpertsShape, queue: ThreadPoolExecutor) -> None:
        super().__init__(shape, queue)
        self._experts: dict[int, tuple[_Matrix, _Matrix, _Matrix]] = {}

    @property
    def nbytes(self) -> int:
        """See ExpertsBackend."""
        return sum(matrix.nbytes for expert in self._experts.values() for matrix in expert)

    def load_expert(self, expert: int, weights: ExpertWeights) -> None:
        """See ExpertsBackend."""
        self.shape.check_expert(expert, weights)
        matrices = []
        for name in ("gate", "up", "down"):
            weight = getattr(weights, name)
            if not isinstance(weight, PackedWeight):
                raise ValueError(f"expert {expert}, {name}: expected INT4 weights, got plain {weight.dtype}")
            matrices.append(_Matrix(weight))
        gate, up, down = matrices
        self._experts[expert] = (gate, up, down)

    def _compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x = hidden.to(torch.float32)  # [T, H]
        out = torch.zeros_like(x)  # [T, H]
        for expert in distinct_experts(ids):
            if expert not in self._experts:
                raise EngineError(f"expert {expert}: expected it to be loaded, got a request for it before")
            gate, up, down = self._experts[expert]
            tokens, k = (ids == expert).nonzero(as_tuple=True)  # [n]
            h = torch.nn.functional.silu(gate(x[tokens])) * up(x[tokens])  # [n, I]
            out.index_add_(0, tokens, weights[tokens, k, None] * down(h))
        out[~hidden.isfinite().all(dim=1)] = torch.nan
        return out

    def close(self) -> None:
        """See ExpertsBackend."""
        self._experts.clear()


class NumbaRuntime(ExpertsRuntime):
    """Make layers of the numba backend; one thread of its own calls numba, whose threads do the work."""

    def __init__(self, threads: int) -> None:
        workers = min(threads, numba.get_num_threads())
        self._queue = ThreadPoolExecutor(
            1, thread_name_prefix="experts-numba", initializer=numba.set_num_threads, initargs=(workers,)
        )
        self.name = "numba, fp32"

    def make_layer(
        self, hidden_size: int, moe_intermediate_size: int, n_routed_experts: int, num_experts_per_tok: int
    ) -> ExpertsBackend:
        """See ExpertsRuntime."""
        shape = ExpertsShape(hidden_size, moe_intermediate_size, n_routed_experts, num_experts_per_tok)
        return NumbaExperts(shape, self._queue)

    def measure_read_gbps(self, seconds: float = 0.1) -> float:
        """See ExpertsRuntime."""
        return measure_torch_read_gbps(seconds)

    def close(self) -> None:
        """See ExpertsRuntime."""
        self._queue.shutdown(wait=True, cancel_futures=True)

"""The experts in plain torch: the oracle that every fast backend is tested against.

Weights stay as they were loaded, INT4 or plain; a matrix is brought to the computing dtype, exactly, when it is used.
The last bit of a row may depend on the batch here, because torch picks a matrix product by its shape.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.functional import silu

from hybrid_k2.checkpoint import ExpertWeights, PackedWeight
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.base import ExpertsBackend, ExpertsRuntime, ExpertsShape, QueuedBackend, distinct_experts
from hybrid_k2.experts.read_probe import probe_bytes


def _plain(weight: PackedWeight | Tensor, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)


def expert_ffn(weights: ExpertWeights, x: Tensor) -> Tensor:
    """Compute one expert in the dtype of `x`.

    Shapes: x [n, H] -> [n, H].
    """
    gate = x @ _plain(weights.gate, x.dtype).T  # [n, I]
    up = x @ _plain(weights.up, x.dtype).T  # [n, I]
    return (silu(gate) * up) @ _plain(weights.down, x.dtype).T  # [n, H]


class ReferenceExperts(QueuedBackend):
    """Compute a layer expert by expert, in ascending order."""

    def __init__(self, shape: ExpertsShape, queue: ThreadPoolExecutor, dtype: torch.dtype) -> None:
        super().__init__(shape, queue)
        self._dtype = dtype
        self._experts: dict[int, ExpertWeights] = {}

    @property
    def nbytes(self) -> int:
        """See ExpertsBackend."""
        return sum(w.gate.nbytes + w.up.nbytes + w.down.nbytes for w in self._experts.values())

    def load_expert(self, expert: int, weights: ExpertWeights) -> None:
        """See ExpertsBackend."""
        self.shape.check_expert(expert, weights)
        self._experts[expert] = weights

    def _compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x = hidden.to(self._dtype)  # [T, H]
        out = torch.zeros_like(x)  # [T, H]
        for expert in distinct_experts(ids):
            if expert not in self._experts:
                raise EngineError(f"expert {expert}: expected it to be loaded, got a request for it before")
            for k in range(ids.shape[1]):
                rows = (ids[:, k] == expert).nonzero().squeeze(1)  # [n]
                if len(rows):
                    out[rows] += weights[rows, k, None].to(self._dtype) * expert_ffn(self._experts[expert], x[rows])
        out[~hidden.isfinite().all(dim=1)] = torch.nan
        return out if self._dtype == torch.float64 else out.to(torch.float32)

    def close(self) -> None:
        """See ExpertsBackend."""
        self._experts.clear()


class ReferenceRuntime(ExpertsRuntime):
    """Make layers of the reference backend; with float64 the result is float64 too, for tests."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self._queue = ThreadPoolExecutor(1, thread_name_prefix="experts-reference")
        self.name = f"reference, {'fp32' if dtype == torch.float32 else str(dtype).removeprefix('torch.')}"

    def make_layer(
        self, hidden_size: int, moe_intermediate_size: int, n_routed_experts: int, num_experts_per_tok: int
    ) -> ExpertsBackend:
        """See ExpertsRuntime."""
        shape = ExpertsShape(hidden_size, moe_intermediate_size, n_routed_experts, num_experts_per_tok)
        return ReferenceExperts(shape, self._queue, self._dtype)

    def measure_read_gbps(self, seconds: float = 0.1) -> float:
        """See ExpertsRuntime."""
        return measure_torch_read_gbps(seconds)

    def close(self) -> None:
        """See ExpertsRuntime."""
        self._queue.shutdown(wait=True, cancel_futures=True)


def measure_torch_read_gbps(seconds: float) -> float:
    """Sum a large buffer with torch's threads over and over and return the best pass, in 10^9 bytes per second."""
    buffer = torch.ones(probe_bytes(torch.get_num_threads()) // 4, dtype=torch.float32)  # zeros may share one page
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        buffer.sum()
        end = time.perf_counter()
        best = min(best, end - start)
        if end >= deadline:
            return buffer.nbytes / best / 1e9

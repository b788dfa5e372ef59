"""kt-kernel's RAWINT4 experts as a contender: the checkpoint's INT4 and bf16 scales, bf16 in, bf16 out.

The package chooses the build for the CPU when it is imported, and the RAWINT4 class as its own loader does. Its Python
class for serving allocates pinned memory, which needs CUDA; so the extension is called with the same arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kt_kernel  # type: ignore[import-not-found]
import numpy as np
from kt_kernel.utils import amx  # type: ignore[import-not-found]

from bench.peers.exchange import GROUP, MATRICES, Array, Matrix, Sizes, read_experts, widen


class KtLayer:
    """Compute the layer on kt-kernel's threads."""

    def __init__(self, name: str, folder: Path, sizes: Sizes, threads: int) -> None:
        kind = amx._select_rawint4_backend(GROUP)
        if kind is None:
            raise RuntimeError(f"no RAWINT4 experts for this CPU in the build {kt_kernel.__cpu_variant__}")
        self.sizes = sizes
        self.pool = kt_kernel.kt_kernel_ext.CPUInfer(_threads(threads))
        self.nowhere = np.zeros(sizes.experts, np.bool_)  # no expert is on a GPU
        config = amx.MOEConfig(sizes.experts, sizes.top_k, sizes.hidden, sizes.intermediate, self.nowhere.ctypes.data)
        config.layer_idx = 0
        config.pool = self.pool.backend_
        config.max_len = sizes.most_tokens
        config.quant_config.bits = 4
        config.quant_config.group_size = GROUP
        config.quant_config.zero_point = False
        # Some of its classes go on reading these arrays: each expert has its own, as from a checkpoint, and they stay.
        self.experts = [
            {key: Matrix(np.array(value.words), np.array(value.scales)) for key, value in matrices.items()}
            for _, matrices in read_experts(folder, sizes)
        ]
        for matrix in MATRICES:
            setattr(config, f"{matrix}_projs", [[_address(expert[matrix].words) for expert in self.experts]])
            setattr(config, f"{matrix}_scales", [[_address(expert[matrix].scales) for expert in self.experts]])
        self.moe = kind(config)
        order = np.arange(sizes.experts, dtype=np.int64)
        self._do(self.moe.load_weights_task(order.ctypes.data))
        self.about: dict[str, Any] = {
            "version": kt_kernel.__version__,
            "isa": kt_kernel.__cpu_variant__,
            "class": kind.__name__,
            "weights": "the checkpoint's INT4 and bf16 scales (RAWINT4)",
        }

    def prepare(self, hidden: Array, ids: Array, weights: Array) -> None:
        """See Layer."""
        self.count = np.array([len(hidden)], np.int32)
        self.arrays = [ids.astype(np.int64), np.ascontiguousarray(weights), np.ascontiguousarray(hidden)]
        self.out = np.zeros_like(hidden)

    def run(self) -> None:
        """See Layer."""
        addresses = [_address(array) for array in (*self.arrays, self.out)]
        self._do(self.moe.forward_task(_address(self.count), self.sizes.top_k, *addresses, False))

    def output(self) -> Array:
        """See Layer."""
        return widen(self.out)

    def _do(self, task: tuple[int, int]) -> None:
        self.pool.submit(task)
        self.pool.sync()


def _threads(threads: int) -> Any:
    """Divide the threads among the NUMA nodes."""
    nodes = min(threads, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1)
    config = kt_kernel.kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count = nodes
    config.subpool_numa_map = list(range(nodes))
    config.subpool_thread_count = [threads * (node + 1) // nodes - threads * node // nodes for node in range(nodes)]
    return config


def _address(array: Array) -> int:
    return int(array.ctypes.data)

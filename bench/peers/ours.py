"""Our own layer as a contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.peers.exchange import Array, Matrix, Sizes, read_experts
from hybrid_k2 import __version__
from hybrid_k2.checkpoint import ExpertWeights, PackedWeight
from hybrid_k2.experts.cpu import NativeRuntime, native_isas
from hybrid_k2.experts.isa import choose_isa, forced_isa
from hybrid_k2.host.threads import spread_threads
from hybrid_k2.placement import Machine


class OurLayer:
    """Compute the layer on the native kernels, in the numerics that the contender is named after."""

    def __init__(self, name: str, folder: Path, sizes: Sizes, threads: int) -> None:
        facts, machine = native_isas(), Machine.probe()
        if not facts:
            raise RuntimeError("expected the native kernels, got none: install g++ 11 or newer, then hybrid-k2 again")
        nodes = spread_threads(threads, machine.core_cpus, machine.nodes, own=not machine.cpu_quota)
        self.runtime = NativeRuntime(choose_isa(facts, forced_isa(), name), threads, name, nodes)
        self.runtime.tuning = self.runtime.measure_tuning()
        self.layer = self.runtime.make_layer(
            hidden_size=sizes.hidden,
            moe_intermediate_size=sizes.intermediate,
            n_routed_experts=sizes.experts,
            num_experts_per_tok=sizes.top_k,
        )
        for expert, matrices in read_experts(folder, sizes):
            self.layer.load_expert(expert, ExpertWeights(**{key: _packed(value) for key, value in matrices.items()}))
        self.about: dict[str, Any] = {
            "version": __version__,
            "isa": self.runtime.isa,
            "tuning": str(self.runtime.tuning),
            "weights": "the checkpoint's INT4 and bf16 scales",
            "activations": "16 bits" if name == "exact" else "8 bits",
        }

    def prepare(self, hidden: Array, ids: Array, weights: Array) -> None:
        """See Layer."""
        self.call = (torch.from_numpy(hidden).view(torch.bfloat16), torch.from_numpy(ids), torch.from_numpy(weights))

    def run(self) -> None:
        """See Layer."""
        self.out = self.layer.forward(*self.call)

    def output(self) -> Array:
        """See Layer."""
        return self.out.float().numpy()

    def limits(self, seconds: float) -> dict[str, float]:
        """Probe the raw read bandwidth and the peak of the multiplying instruction."""
        return {
            "read_gbps": self.runtime.measure_read_gbps(seconds),
            "peak_gops": self.runtime.measure_peak_gops(seconds),
        }


def _packed(matrix: Matrix) -> PackedWeight:
    words, scales = (torch.from_numpy(np.array(part)) for part in (matrix.words, matrix.scales))
    return PackedWeight(words, scales.view(torch.bfloat16))

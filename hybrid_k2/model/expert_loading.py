"""Fill one layer's routed experts from a checkpoint: several threads read, repack and check."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from hybrid_k2.checkpoint import Checkpoint, ExpertWeights, PackedWeight, StoredExpert
from hybrid_k2.config import ModelConfig
from hybrid_k2.experts import ExpertsBackend
from hybrid_k2.model.devices import torch_dtype

MAX_READERS = 16  # threads that read and repack experts; each keeps up to 9 MB of scratch memory
INT4 = "int4"  # the plan's name for experts that stay as they are stored


def load_experts(
    backend: ExpertsBackend,
    checkpoint: Checkpoint,
    config: ModelConfig,
    layer: int,
    *,
    dtype: str,
    threads: int,
    count: Callable[[int], None],
) -> None:
    """Load all experts of one layer; `count` is called in the caller's thread with the bytes of each.

    Effects: reads with up to `threads` threads, which have ended on return, also when one fails or the user interrupts.
    Raises: CheckpointError naming tensor and file.
    """

    def load(expert: int) -> int:
        stored = StoredExpert(checkpoint, config, layer, expert)
        if dtype == INT4:
            backend.load_stored(expert, stored)
        else:
            backend.load_expert(expert, _plain_as(stored.read(), torch_dtype(dtype)))
        return stored.nbytes

    with ThreadPoolExecutor(min(threads, MAX_READERS), "load-experts") as readers:
        # When one fails or the user interrupts, map cancels those that have not begun.
        for nbytes in readers.map(load, range(config.n_routed_experts)):
            count(nbytes)


def _plain_as(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    gate, up, down = (
        weight.dequantize(dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)
        for weight in (weights.gate, weights.up, weights.down)
    )
    return ExpertWeights(gate, up, down)

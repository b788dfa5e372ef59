"""Fill one layer's routed experts from a checkpoint: several threads read, repack and check."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from hybrid_k2.checkpoint import Checkpoint, ExpertWeights, PackedWeight, expert_prefix, read_expert
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import CheckpointError
from hybrid_k2.experts import ExpertsBackend
from hybrid_k2.model.devices import torch_dtype

MAX_READERS = 8  # threads that read and repack experts
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
        weights = read_expert(checkpoint, config, layer, expert)
        prefix = expert_prefix(config, layer, expert)
        try:
            backend.load_expert(expert, weights if dtype == INT4 else _plain_as(weights, torch_dtype(dtype)))
        except CheckpointError as error:  # the backend knows neither names nor files
            place = _files(checkpoint, prefix)
            raise CheckpointError(f"{prefix}: {error.message} (in {place})", hint=error.hint) from None
        return sum(checkpoint.linear_bytes(f"{prefix}.{part}_proj") for part in ("gate", "up", "down"))

    with ThreadPoolExecutor(min(threads, MAX_READERS), "load-experts") as readers:
        # When one fails or the user interrupts, map cancels those that have not begun.
        for nbytes in readers.map(load, range(config.n_routed_experts)):
            count(nbytes)


def _files(checkpoint: Checkpoint, prefix: str) -> str:
    """Name the files that hold parts of one expert."""
    infos = checkpoint.infos
    return ", ".join(sorted({info.file.name for name, info in infos.items() if name.startswith(f"{prefix}.")}))


def _plain_as(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    gate, up, down = (
        weight.dequantize(dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)
        for weight in (weights.gate, weights.up, weights.down)
    )
    return ExpertWeights(gate, up, down)

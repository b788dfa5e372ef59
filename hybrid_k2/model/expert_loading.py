"""Fill one layer's routed experts from a checkpoint: several threads read, repack and check."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from hybrid_k2.checkpoint import Checkpoint, ExpertWeights, PackedWeight, StoredExpert
from hybrid_k2.config import ModelConfig
from hybrid_k2.experts import ExpertsBackend, ExpertsRuntime
from hybrid_k2.experts.cpu import NativeRuntime
from hybrid_k2.model.devices import torch_dtype
from hybrid_k2.model.room import room_for
from hybrid_k2.placement.memories import HOST

log = logging.getLogger("hybrid_k2")

MAX_READERS = 16  # threads that read and repack experts; each keeps up to 9 MB of scratch memory
MOSTLY = 0.9  # of the memory; the ends of allocations may lie on small pages
INT4 = "int4"  # the plan's name for experts that stay as they are stored


def make_layer(runtime: ExpertsRuntime, config: ModelConfig, layer: int, room: int) -> ExpertsBackend:
    """Take memory for `room` of the routed experts of a layer; only native kernels can do with less than all.

    Raises: MemoryBudgetError.
    """
    sizes = (config.hidden_size, config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok)
    with room_for(f"routed experts of layer {layer}", HOST):
        return runtime.make_layer(*sizes, room) if isinstance(runtime, NativeRuntime) else runtime.make_layer(*sizes)


def load_experts(
    backend: ExpertsBackend,
    checkpoint: Checkpoint,
    config: ModelConfig,
    layer: int,
    experts: Sequence[int],
    *,
    dtype: str,
    threads: int,
    count: Callable[[int], None],
) -> None:
    """Load these experts of one layer; `count` is called in the caller's thread with the bytes of each.

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
        for nbytes in readers.map(load, experts):
            count(nbytes)


def warn_of_small_pages(backend: ExpertsBackend) -> None:
    """Warn, with what it costs, if a loaded layer does not lie on huge pages, as far as the system tells."""
    share = backend.huge_page_share
    if share is not None and share < MOSTLY:
        log.warning(
            "%.0f %% of the experts' memory lies on huge pages, expected nearly all: reading them may be up to a "
            "quarter slower (see /sys/kernel/mm/transparent_hugepage/enabled; a restart mends fragmented memory)",
            100 * share,
        )


def _plain_as(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    gate, up, down = (
        weight.dequantize(dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)
        for weight in (weights.gate, weights.up, weights.down)
    )
    return ExpertWeights(gate, up, down)

"""Whole layers by the extension: for few rows, the interpreter takes longer between the parts than some of them do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hybrid_k2.dense import HostMatrix
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.model.batch import Batch
from hybrid_k2.model.host_rows import as_array
from hybrid_k2.model.layer import Layer
from hybrid_k2.model.mla import MlaShape
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.rope import Rotation
from hybrid_k2.native import native

FEW_ROWS = 64  # more of them take so long that nobody notices the interpreter


class HostLayer:
    """Compute a layer of which everything is native and on the same threads, with the bits of its parts one by one."""

    def __init__(self, layer: Layer, memory: Any) -> None:
        """Take over the parts of a layer that `fits`; `memory`: of those that compute one after the other."""
        a, shared = layer.attention, layer.mlp.shared if isinstance(layer.mlp, Moe) else layer.mlp
        matrices = {"q_a": a.q_a, "kv_a": a.kv_a, "q_b": a.q_b, "o": a.o}
        matrices |= {"gate": shared.gate, "up": shared.up, "down": shared.down}
        norms = {"input_norm": layer.input_norm, "q_a_norm": a.q_a_norm, "kv_a_norm": a.kv_a_norm}
        norms["post_norm"] = layer.post_norm
        rule: tuple[Any, int, bool, float] | None = None
        experts = None
        if isinstance(layer.mlp, Moe):
            router, experts = layer.mlp.router, layer.mlp.experts.native
            matrices["router"] = router.weight
            rule = as_array(router.bias), router.experts_per_token, router.normalise, router.scale
        self._layer = native.HostLayer(
            a.native.kernels,
            memory,
            {name: (as_array(norm.weight), norm.eps) for name, norm in norms.items()},
            {name: matrix.native for name, matrix in matrices.items()},
            as_array(a.kv_b),
            rule,
            experts,
        )

    @staticmethod
    def fits(layer: Layer) -> bool:
        """Say whether all of the layer is native, in one place and on the same threads."""
        a, mlp = layer.attention, layer.mlp
        shared = mlp.shared if isinstance(mlp, Moe) else mlp
        matrices = [a.q_a, a.kv_a, a.q_b, a.o, shared.gate, shared.up, shared.down]
        if isinstance(mlp, Moe):
            if not isinstance(mlp.experts, NativeExperts) or mlp.hot is not None or mlp.router.kernel:
                return False
            matrices.append(mlp.router.weight)
        threads = {id(matrix.runtime) for matrix in matrices if isinstance(matrix, HostMatrix)}
        whole = all(isinstance(matrix, HostMatrix) for matrix in matrices) and len(threads) == 1
        norms = (layer.input_norm, a.q_a_norm, a.kv_a_norm, layer.post_norm)
        return whole and a.native is not None and a.gpu is None and all(norm.threads is not None for norm in norms)

    def run(self, x: Tensor, batch: Batch, pages: Tensor, rotation: Rotation) -> Tensor | None:
        """Take the residual stream through the layer, where it lies.

        Shapes: x [T, hidden] fp32, contiguous; pages [pages, page_tokens, kv_lora + rope] bf16 or fp32 -> the chosen
        experts [T, K] int32, where the layer has some.
        Effects: changes `x`, and writes the rows' latents to `pages`.
        Raises: ValueError for shapes that do not fit and pages that do not exist; EngineError if the threads stopped.
        """
        arrays = map(as_array, (x, rotation.cos, rotation.sin, pages, batch.page_table, batch.spans))
        ids = self._layer.run(*arrays)
        return None if ids is None else torch.from_numpy(ids)


def joined(layers: Sequence[Layer]) -> list[Layer]:
    """Return layers that compute few rows in one go, where they can."""
    if native is None:
        return list(layers)
    memory = native.StepMemory()
    return [replace(layer, whole=HostLayer(layer, memory)) if HostLayer.fits(layer) else layer for layer in layers]


def few_rows(batch: Batch, shape: MlaShape) -> bool:
    """Say whether whole layers compute this batch: few rows, each of which attends in the absorbed form."""
    return len(batch.token_ids) <= FEW_ROWS and all(
        shape.prefer_absorbed(sequence.stop - sequence.start, sequence.length) for sequence in batch.sequences
    )

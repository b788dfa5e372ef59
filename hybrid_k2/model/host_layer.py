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
from hybrid_k2.model.layers import Matrix
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.native_attention import NativeAttention
from hybrid_k2.model.rope import Rotation
from hybrid_k2.native import native

FEW_ROWS = 64  # more of them take so long that nobody notices the interpreter


class HostLayer:
    """Compute a layer of which everything is native and on the same threads, with the bits of its parts one by one."""

    def __init__(self, layer: Layer, attention: NativeAttention, matrices: dict[str, HostMatrix], memory: Any) -> None:
        """Take over the parts of a layer; see `open`."""
        a, moe = layer.attention, layer.mlp if isinstance(layer.mlp, Moe) else None
        norms = {"q_a_norm": a.q_a_norm, "kv_a_norm": a.kv_a_norm}
        norms |= {"input_norm": layer.input_norm, "post_norm": layer.post_norm}
        router = moe and moe.router
        experts = moe.experts.native if moe is not None and isinstance(moe.experts, NativeExperts) else None
        self._layer = native.HostLayer(
            attention.kernels,
            memory,
            {name: (as_array(norm.weight), norm.eps) for name, norm in norms.items()},
            {name: matrix.native for name, matrix in matrices.items()},
            as_array(a.kv_b),
            router and (as_array(router.bias), router.experts_per_token, router.normalise, router.scale),
            experts,
        )

    @classmethod
    def open(cls, layer: Layer, memory: Any) -> HostLayer | None:
        """Return it if all of the layer is native, in host memory and on the same threads.

        `memory`: a `StepMemory` of the extension, for layers that compute one after the other.
        """
        a, mlp = layer.attention, layer.mlp
        mlp, router = (mlp.shared, mlp.router) if isinstance(mlp, Moe) else (mlp, None)
        parts: dict[str, Matrix] = {"q_a": a.q_a, "kv_a": a.kv_a, "q_b": a.q_b, "o": a.o}
        parts |= {"gate": mlp.gate, "up": mlp.up, "down": mlp.down}
        if router is not None:
            parts["router"] = router.weight
        matrices = {name: part for name, part in parts.items() if isinstance(part, HostMatrix)}
        together = len(matrices) == len(parts) and len({id(matrix.runtime) for matrix in matrices.values()}) == 1
        norms = (layer.input_norm, a.q_a_norm, a.kv_a_norm, layer.post_norm)
        if not together or a.native is None or a.gpu is not None or any(norm.threads is None for norm in norms):
            return None
        if isinstance(layer.mlp, Moe) and (
            layer.mlp.hot is not None or not isinstance(layer.mlp.experts, NativeExperts)
        ):
            return None
        return cls(layer, a.native, matrices, memory)

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
    return [replace(layer, whole=HostLayer.open(layer, memory)) for layer in layers]

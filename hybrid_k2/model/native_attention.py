"""Attention in the absorbed form by the native kernels, over the pages of a cache in host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.model.batch import Batch
from hybrid_k2.model.host_rows import as_array, on_host
from hybrid_k2.model.layers import RmsNorm
from hybrid_k2.model.mla import MlaShape
from hybrid_k2.model.rope import Rotation
from hybrid_k2.native import native


class NativeAttention:
    """Attend on the threads of the experts; one for all layers of a model."""

    def __init__(self, runtime: Any, shape: MlaShape) -> None:
        self.kernels = native.LatentAttention(
            runtime, shape.heads, shape.nope, shape.rope, shape.value, shape.kv_lora, shape.scale
        )

    @classmethod
    def open(cls, experts: ExpertsRuntime, shape: MlaShape) -> NativeAttention | None:
        """Return it for the threads of this runtime, or None where torch is the better choice.

        That is without the extension, and for the portable kernels, which define the result and are slow.
        """
        if experts.native is None or experts.native.isa == "portable":
            return None
        return cls(experts.native, shape)

    @staticmethod
    def takes(latent: Tensor, q: Tensor, pages: Tensor) -> bool:
        """Say whether `append` can take these: rows in fp32, and a cache that it can write, on the host."""
        return on_host(latent, q) and pages.device.type == "cpu" and pages.dtype in (torch.bfloat16, torch.float32)

    def append(self, latent: Tensor, norm: RmsNorm, rotation: Rotation, q: Tensor, batch: Batch, pages: Tensor) -> None:
        """Norm and rotate new latents into the cache, and rotate the queries where they lie.

        Shapes: latent [T, kv_lora + rope or more] and q [T, heads, nope + rope] fp32, contiguous; norm [kv_lora]; pages
        [pages, page_tokens, kv_lora + rope] bf16 or fp32.
        Effects: writes `pages` and the last columns of `q`.
        Raises: ValueError for shapes that do not fit and pages that do not exist; EngineError if the threads stopped.
        """
        arrays = map(as_array, (rotation.cos, rotation.sin, q, pages, batch.page_table, batch.spans))
        self.kernels.append(as_array(latent), as_array(norm.weight), norm.eps, *arrays)

    def attend(self, q: Tensor, kv_b: Tensor, pages: Tensor, page_table: Tensor, spans: Tensor, out: Tensor) -> None:
        """Fill in the rows of these sequences.

        A row depends on its own query and on the latents up to its own place: it has the same bits in any batch, any
        chunk of its sequence, and with any number of threads.
        Shapes: q [T, heads, nope + rope] fp32; kv_b [heads * (nope + value), kv_lora] and pages [pages, page_tokens,
        kv_lora + rope] bf16 or fp32; page_table [P] and spans [S, 4] as in Batch; out [T, heads, value] fp32.
        Effects: writes to `out`, not to rows of other sequences.
        Raises: ValueError for shapes that do not fit and pages that do not exist; EngineError if the threads stopped.
        """
        self.kernels.attend(*map(as_array, (q, kv_b, pages, page_table, spans, out)))

    def measure_peak_gflops(self, seconds: float = 0.1) -> float:
        """Return how many 10^9 multiplications and additions per second the threads can do in fp32: the bound."""
        return float(self.kernels.measure_peak_gops(seconds))

"""Attention's steps by the Triton kernels, over the pages of a cache on a GPU. Never run on one (docs/verified.md)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_k2.accelerator.kernels import have_triton
from hybrid_k2.model.batch import Places
from hybrid_k2.model.mla import MlaShape
from hybrid_k2.model.rope import Rotation
from hybrid_k2.placement.overheads import SEQUENCES
from hybrid_k2.placement.plan import KvCachePlan

log = logging.getLogger("hybrid_k2")

LEAST = 16  # tensor cores multiply no fewer columns
KEYS = 32  # of a tile: the smallest page


@dataclass(frozen=True)
class GpuAttention:
    """Append latents and rotate queries in one launch; attend from few new tokens to all pages, keys cut into splits.

    Queries, softmax weights and sums of latents are rounded to bf16 for the tensor cores (docs/gpu-kernels.md).
    """

    shape: MlaShape
    page_tokens: int

    # New tokens of a sequence up to which the kernel is used: scratch memory is planned for so many rows.
    most_rows = SEQUENCES

    @classmethod
    def open(cls, shape: MlaShape, cache: KvCachePlan) -> GpuAttention | None:
        """Return it if triton is there and has kernels for these sizes; else torch computes attention."""
        if not have_triton():
            return None
        sizes = {"kv_lora": shape.kv_lora, "rope": shape.rope, "tokens of a page": cache.page_tokens}
        odd = [f"{name} {n}" for name, n in sizes.items() if n < LEAST or n & (n - 1)]
        if cache.dtype != "bf16":
            odd.append(f"a cache in {cache.dtype}")
        if cache.page_tokens % KEYS:
            odd.append(f"pages of {cache.page_tokens} tokens")
        if odd:
            log.info("attention on %s: torch computes it, there are no kernels for %s", cache.device, ", ".join(odd))
            return None
        return cls(shape, cache.page_tokens)

    def append(
        self, latent: Tensor, norm: Tensor, eps: float, rotation: Rotation, q: Tensor, places: Places, pages: Tensor
    ) -> None:
        """Norm and rotate new latents into the cache, and rotate the queries where they lie.

        Shapes: latent [T, kv_lora + rope], norm [kv_lora], q [T, heads, nope + rope], pages [pages, page_tokens,
        kv_lora + rope].
        Effects: writes `pages` and the last columns of `q`.
        """
        from hybrid_k2.accelerator.kernels.norm_rope import append_and_rotate

        q_rope = q[..., self.shape.nope :]
        angles = rotation.cos, rotation.sin
        append_and_rotate(latent.contiguous(), norm, eps, angles, places.slots, pages, q_rope, q_rope)

    def attend(self, q: Tensor, kv_b: Tensor, pages: Tensor, places: Places, rows: Tensor | None) -> Tensor:
        """Attend from rotated queries to the latents of their sequences, up to themselves.

        Shapes: q [R, heads, nope + rope]; kv_b [heads, nope + value, kv_lora]; pages [pages, page_tokens, kv_lora +
        rope]; rows int64 [R], which rows of the batch they are, None for all -> [R, heads, value] in kv_b's dtype.
        """
        from hybrid_k2.accelerator.kernels.mla_decode import mla_decode

        shape, q = self.shape, q.to(kv_b.dtype)
        first, lengths = places.first_pages, places.lengths
        if rows is not None:
            first, lengths = first[rows], lengths[rows]
        q_nope, q_rope = q[..., : shape.nope], q[..., shape.nope :]
        absorbed = torch.bmm(q_nope.transpose(0, 1), kv_b[:, : shape.nope])  # [heads, R, kv_lora]
        latent_q = torch.cat((absorbed.transpose(0, 1), q_rope), dim=-1)  # [R, heads, kv_lora + rope]
        parts = zip(*(torch.split(whole, self.most_rows) for whole in (latent_q, first, lengths)), strict=True)
        contexts = [mla_decode(a, pages, places.page_table, b, c, shape.scale, shape.kv_lora) for a, b, c in parts]
        context = torch.cat(contexts).to(kv_b.dtype).transpose(0, 1)  # [heads, R, kv_lora]
        return torch.bmm(context, kv_b[:, shape.nope :].transpose(1, 2)).transpose(0, 1)

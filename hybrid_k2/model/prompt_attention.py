"""Attention of prompts on a GPU: the naive form in bf16, by torch's fused kernels. Never run on one so far."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention

from hybrid_k2.model.mla import WORK_BYTES, MlaShape, naive_attention

BF16_BYTES = 2
MASK_BYTES = 4  # of a query and a token: a mask, and what torch makes of it


def prompt_attention(q: Tensor, latent: Tensor, kv_b: Tensor, shape: MlaShape) -> Tensor:
    """Attend with keys and values made from the latents, a few heads at a time; scores are never in memory.

    Inputs of products are rounded to bf16, sums and softmax are fp32. Where torch has no fused kernel for these sizes
    on this card, it is `naive_attention`.
    Shapes: q [T, heads, nope + rope], for the last T of L tokens; latent [L, kv_lora + rope];
    kv_b [heads, nope + value, kv_lora] -> [T, heads, value] fp32.
    Memory: about 3 * WORK_BYTES, or what the keys and values of one head need if that is more.
    """
    tokens, keys = len(latent), shape.nope + shape.rope
    latent, by_head = latent.bfloat16(), q.bfloat16().transpose(0, 1)  # [heads, T, nope + rope]
    c, k_rope = latent[:, : shape.kv_lora], latent[:, shape.kv_lora :]  # [L, kv_lora], [L, rope]
    out = q.new_empty(len(q), shape.heads, shape.value, dtype=torch.float32)
    group = max(1, WORK_BYTES // (tokens * (keys + shape.value) * BF16_BYTES))
    for first in range(0, shape.heads, group):
        heads = slice(first, first + group)
        kv = torch.matmul(c, kv_b[heads].bfloat16().transpose(1, 2))  # [g, L, nope + value]
        k = torch.cat((kv[..., : shape.nope], k_rope.expand(len(kv), -1, -1)), dim=-1)  # [g, L, nope + rope]
        part = _causal(by_head[heads], k, kv[..., shape.nope :].contiguous(), shape.scale)  # [g, T, value]
        if part is None:
            return naive_attention(q.float(), latent, kv_b, shape)
        out[:, heads] = part.transpose(0, 1)
    return out


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """Attend from the last T of L tokens to themselves and all before; None where no fused kernel does.

    A block of queries at a time, where they need a mask: torch's own has each query see as many tokens as its number.
    Shapes: q [g, T, d], k [g, L, d], v [g, L, e], all bf16 -> [g, T, e].
    """
    queries, tokens = q.shape[1], k.shape[1]
    whole = queries == tokens
    block = queries if whole else max(1, WORK_BYTES // (tokens * MASK_BYTES))
    parts = []
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        seen = tokens - queries + stop  # tokens up to the block's last query
        mask = None
        if not whole:
            mask = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device).tril(seen - (stop - start))
        inputs = q[None, :, start:stop], k[None, :, :seen], v[None, :, :seen]
        if not _fused(*inputs, mask):
            return None
        parts.append(scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=whole, scale=scale)[0])
    return torch.cat(parts, dim=1)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Say whether torch has a kernel that keeps no scores; on the host, where tests call this, memory is no concern."""
    if q.device.type == "cpu":
        return True
    params = SDPAParams(q, k, v, mask, 0.0, mask is None, False)
    return bool(can_use_flash_attention(params) or can_use_efficient_attention(params))

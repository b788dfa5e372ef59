"""Attention of prompts on a GPU: the naive form in bf16, by torch's fused kernels. Never run on one so far."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from hybrid_k2.model.mla import WORK_BYTES, MlaShape, naive_attention

BF16_BYTES = 2


def prompt_attention(q: Tensor, latent: Tensor, kv_b: Tensor, shape: MlaShape) -> Tensor:
    """Attend with keys and values made from the latents, a few heads at a time; all scores are never in memory.

    Inputs of products are rounded to bf16, sums and softmax are fp32. Where torch has no fused kernel for these sizes
    on this card, it is `naive_attention`.
    Shapes: q [T, heads, nope + rope], for the last T of L tokens; latent [L, kv_lora + rope];
    kv_b [heads, nope + value, kv_lora] -> [T, heads, value] fp32.
    Memory: about 2 * WORK_BYTES, or what the keys and values of one head need if that is more.
    """
    tokens, keys = len(latent), shape.nope + shape.rope
    wide, latent, by_head = q, latent.bfloat16(), q.bfloat16().transpose(0, 1)  # [heads, T, nope + rope]
    c, k_rope = latent[:, : shape.kv_lora], latent[:, shape.kv_lora :]  # [L, kv_lora], [L, rope]
    causal = causal_lower_right(len(q), tokens)
    out = q.new_empty(len(q), shape.heads, shape.value, dtype=torch.float32)
    group = max(1, WORK_BYTES // (tokens * (keys + shape.value) * BF16_BYTES))
    for first in range(0, shape.heads, group):
        heads = slice(first, first + group)
        kv = torch.matmul(c, kv_b[heads].bfloat16().transpose(1, 2))  # [g, L, nope + value]
        k = torch.cat((kv[..., : shape.nope], k_rope.expand(len(kv), -1, -1)), dim=-1)  # [g, L, nope + rope]
        parts = by_head[None, heads], k[None], kv[None, ..., shape.nope :].contiguous()
        if not _fused(*parts):
            return naive_attention(wide.float(), latent, kv_b, shape)
        part = scaled_dot_product_attention(*parts, attn_mask=causal, scale=shape.scale)  # [1, g, T, value]
        out[:, heads] = part[0].transpose(0, 1)
    return out


def _fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Say whether torch has a kernel that keeps no scores; on the host, where tests call this, memory is no concern."""
    if q.device.type == "cpu":
        return True
    params = SDPAParams(q, k, v, None, 0.0, q.shape[2] == k.shape[2], False)
    return bool(can_use_flash_attention(params) or can_use_efficient_attention(params))

"""Latent attention of one sequence in its two forms, over the same cached latents, in fp32.

A latent is c | k_rope: `kv_lora` columns from which keys and values of all heads can be made, then the rotated key
columns that all heads share. kv_b holds, per head, the rows W_UK (c to the key's columns without position) and then
W_UV (c to the value).

naive      makes keys and values of every cached token, per head, then attends as usual: best for many new tokens.
absorbed   moves W_UK to the query and W_UV behind the sum, and attends to the latents themselves: best for few.

Both are the same function; `prefer_absorbed` counts their multiplications.

Memory beside inputs and outputs: kv_b and the sequence's latents in fp32 (no copy where they are already), and work
buffers of at most about 4 * WORK_BYTES, or what one head's keys and one query's scores need if that is more. A context
of 64k tokens with 64 heads therefore takes 151 MB of fp32 latents and about 256 MB more, where all scores of a
512-token chunk would take 8.6 GB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_k2.config import ModelConfig

WORK_BYTES = 64 << 20  # large enough for efficient products, small beside any model
FP32_BYTES = 4


@dataclass(frozen=True)
class MlaShape:
    """Hold the sizes of latent attention and its softmax scale."""

    heads: int
    nope: int
    rope: int
    value: int
    kv_lora: int
    scale: float

    @classmethod
    def of(cls, config: ModelConfig) -> MlaShape:
        """Take the sizes from a model's configuration."""
        return cls(
            heads=config.num_attention_heads,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            kv_lora=config.kv_lora_rank,
            scale=config.softmax_scale,
        )

    def prefer_absorbed(self, queries: int, tokens: int) -> bool:
        """Say whether the absorbed form needs no more multiplications for this many new and all tokens."""
        expand = (self.nope + self.value) * self.kv_lora  # per head: one token through W_UK and W_UV
        absorbed = queries * expand + queries * tokens * (2 * self.kv_lora + self.rope)
        naive = tokens * expand + queries * tokens * (self.nope + self.rope + self.value)
        return absorbed <= naive


def naive_attention(q: Tensor, latent: Tensor, kv_b: Tensor, shape: MlaShape) -> Tensor:
    """Attend with keys and values made from the latents, a few heads at a time.

    Shapes: q [T, heads, nope + rope] fp32, for the last T of L tokens; latent [L, kv_lora + rope] fp32;
    kv_b [heads, nope + value, kv_lora] fp32 -> [T, heads, value] fp32.
    """
    tokens = latent.shape[0]
    c, k_rope = latent[:, : shape.kv_lora], latent[:, shape.kv_lora :]  # [L, kv_lora], [L, rope]
    per_head = tokens * (shape.nope + shape.rope + shape.value) * FP32_BYTES
    group = max(1, WORK_BYTES // per_head)
    out = q.new_empty(q.shape[0], shape.heads, shape.value)  # [T, heads, value]
    for h in range(0, shape.heads, group):
        heads = slice(h, min(h + group, shape.heads))
        kv = torch.matmul(c, kv_b[heads].transpose(1, 2))  # [g, L, nope + value]
        k_nope, v = kv[..., : shape.nope], kv[..., shape.nope :]  # [g, L, nope], [g, L, value]
        k = torch.cat((k_nope, k_rope.expand(len(kv), -1, -1)), dim=-1)  # [g, L, nope + rope]
        part = causal_attention(q[:, heads].transpose(0, 1), k, v, shape.scale)  # [g, T, value]
        out[:, heads] = part.transpose(0, 1)
    return out


def absorb_queries(q: Tensor, kv_b: Tensor, shape: MlaShape) -> Tensor:
    """Turn queries into queries over latents.

    Shapes: q [T, heads, nope + rope] fp32, kv_b [heads, nope + value, kv_lora] fp32 -> [heads, T, kv_lora + rope].
    """
    by_head = q.transpose(0, 1)
    q_nope, q_rope = by_head[..., : shape.nope], by_head[..., shape.nope :]  # [heads, T, nope], [heads, T, rope]
    q_c = torch.bmm(q_nope, kv_b[:, : shape.nope])  # [heads, T, kv_lora]
    return torch.cat((q_c, q_rope), dim=-1)  # [heads, T, kv_lora + rope]


def latent_attention(q: Tensor, latent: Tensor, shape: MlaShape) -> Tensor:
    """Attend to latents with absorbed queries.

    Shapes: q [heads, T, kv_lora + rope] fp32, latent [L, kv_lora + rope] fp32 -> [heads, T, kv_lora] fp32.
    """
    return causal_attention(q, latent, latent[:, : shape.kv_lora], shape.scale)


def expand_values(context: Tensor, kv_b: Tensor, shape: MlaShape) -> Tensor:
    """Turn sums of latents into sums of values.

    Shapes: context [heads, T, kv_lora] fp32, kv_b [heads, nope + value, kv_lora] fp32 -> [T, heads, value] fp32.
    """
    return torch.bmm(context, kv_b[:, shape.nope :].transpose(1, 2)).transpose(0, 1)  # [T, heads, value]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend from the last T of L tokens to themselves and all before, a block of queries at a time.

    Shapes: q [h, T, d]; k [L, d] or [h, L, d]; v [L, e] or [h, L, e]; all fp32 -> [h, T, e].
    """
    heads, queries, _ = q.shape
    tokens = k.shape[-2]
    block = max(1, WORK_BYTES // (heads * tokens * FP32_BYTES))
    out = q.new_empty(heads, queries, v.shape[-1])  # [h, T, e]
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        seen = tokens - queries + stop  # tokens up to the block's last query
        scores = torch.matmul(q[:, start:stop] * scale, k[..., :seen, :].transpose(-2, -1))  # [h, B, seen]
        # Only the last B columns hold tokens after some query of the block.
        scores[..., seen - (stop - start) :].masked_fill_(_later(stop - start, q.device), -torch.inf)
        out[:, start:stop] = torch.matmul(scores.softmax(dim=-1), v[..., :seen, :])  # [h, B, e]
    return out


def _later(size: int, device: torch.device) -> Tensor:
    """Mark the tokens after each query: the triangle above the diagonal, [B, B]."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)

"""Latent attention of one sequence in its two forms, over the same cached latents, in fp32.

A latent is c | k_rope: `kv_lora` columns from which keys and values of all heads can be made, then the rotated key
columns that all heads share. kv_b holds, per head, the rows W_UK (c to the key's columns without position) and then
W_UV (c to the value).

naive      makes keys and values of every cached token, per head, then attends as usual: best for many new tokens.
absorbed   moves W_UK to the query and W_UV behind the sum, and attends to the latents themselves: best for few.

Both are the same function; `prefer_absorbed` counts their multiplications.

Weights and latents come in the dtype that they are kept in. On the host they are widened to fp32, which is exact, a few
heads or some hundred tokens at a time: such a block stays in a CPU's caches and in memory that is used over and over,
where fresh memory for whole matrices costs more than the arithmetic of a decode step.

Memory beside inputs and outputs: work buffers of at most about 4 * WORK_BYTES, or what one head's keys and one query's
scores need if that is more. The naive form also takes the sequence's latents in fp32 (151 MB for 64k tokens). All
scores of a 512-token chunk behind 64k tokens, with 64 heads, would take 8.6 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_k2.config import ModelConfig
from hybrid_k2.model.layers import WIDENED_NUMBERS

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

    Shapes: q [T, heads, nope + rope] fp32, for the last T of L tokens; latent [L, kv_lora + rope];
    kv_b [heads, nope + value, kv_lora] -> [T, heads, value] fp32.
    """
    latent = latent.to(q)
    c, k_rope = latent[:, : shape.kv_lora], latent[:, shape.kv_lora :]  # [L, kv_lora], [L, rope]
    per_head = len(latent) * (shape.nope + shape.rope + shape.value) * FP32_BYTES
    out = q.new_empty(q.shape[0], shape.heads, shape.value)  # [T, heads, value]
    for heads, w in _widened_heads(kv_b, max(1, WORK_BYTES // per_head)):
        kv = torch.matmul(c, w.transpose(1, 2))  # [g, L, nope + value]
        k_nope, v = kv[..., : shape.nope], kv[..., shape.nope :]  # [g, L, nope], [g, L, value]
        k = torch.cat((k_nope, k_rope.expand(len(kv), -1, -1)), dim=-1)  # [g, L, nope + rope]
        part = causal_attention(q[:, heads].transpose(0, 1), k, v, shape.scale)  # [g, T, value]
        out[:, heads] = part.transpose(0, 1)
    return out


def absorb_queries(q: Tensor, kv_b: Tensor, shape: MlaShape) -> Tensor:
    """Turn queries into queries over latents.

    Shapes: q [T, heads, nope + rope] fp32, kv_b [heads, nope + value, kv_lora] -> [heads, T, kv_lora + rope] fp32.
    """
    by_head = q.transpose(0, 1)
    q_nope, q_rope = by_head[..., : shape.nope], by_head[..., shape.nope :]  # [heads, T, nope], [heads, T, rope]
    out = q.new_empty(*by_head.shape[:2], shape.kv_lora + shape.rope)  # [heads, T, kv_lora + rope]
    for heads, w_uk in _widened_heads(kv_b[:, : shape.nope], shape.heads):
        out[heads, :, : shape.kv_lora] = torch.bmm(q_nope[heads], w_uk)  # [g, T, kv_lora]
    out[..., shape.kv_lora :] = q_rope
    return out


def latent_attention(q: Tensor, latent: Tensor, shape: MlaShape) -> Tensor:
    """Attend to latents with absorbed queries, a block of queries at a time.

    Shapes: q [heads, T, kv_lora + rope] fp32, for the last T of L tokens; latent [L, kv_lora + rope], on any device
    -> [heads, T, kv_lora] fp32.
    """
    heads, queries, size = q.shape
    before = len(latent) - queries
    tokens = max(1, min(len(latent), _block_numbers(q.device) // size))  # of one block of latents
    block = max(1, WORK_BYTES // (heads * max(tokens, size) * FP32_BYTES))
    out = q.new_empty(heads, queries, shape.kv_lora)  # [heads, T, kv_lora]
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        part = q[:, start:stop] * shape.scale  # [heads, B, kv_lora + rope]
        out[:, start:stop] = _running_attention(part, latent[: before + stop], tokens, shape.kv_lora)
    return out


def _running_attention(q: Tensor, latent: Tensor, tokens: int, kv_lora: int) -> Tensor:
    """Attend to so many tokens at a time; sums are kept relative to the highest score so far ("online softmax").

    Shapes: q [heads, B, kv_lora + rope] fp32, scaled, for the last B of L tokens -> [heads, B, kv_lora] fp32.
    """
    queries = q.shape[1]
    highest = q.new_full((len(q), queries, 1), -torch.inf)  # [heads, B, 1]
    total = torch.zeros_like(highest)  # [heads, B, 1]
    context = q.new_zeros(len(q), queries, kv_lora)  # [heads, B, kv_lora]
    for start in range(0, len(latent), tokens):
        k = latent[start : start + tokens].to(q)  # [b, kv_lora + rope]
        scores = torch.matmul(q, k.T)  # [heads, B, b]
        # Query i sees the tokens up to its own place; the first block has one that all of them see.
        own_place = len(latent) - queries - start
        if own_place + 1 < len(k):
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(own_place + 1)  # [B, b]
            scores.masked_fill_(later, -torch.inf)
        peak = torch.maximum(highest, scores.amax(-1, keepdim=True))  # [heads, B, 1]
        weights = scores.sub_(peak).exp_()  # [heads, B, b]
        shrink = highest.sub_(peak).exp_()  # [heads, B, 1]
        total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        context.mul_(shrink).add_(torch.matmul(weights, k[:, :kv_lora]))
        highest = peak
    return context.div_(total)


def expand_values(context: Tensor, kv_b: Tensor, shape: MlaShape) -> Tensor:
    """Turn sums of latents into sums of values.

    Shapes: context [heads, T, kv_lora] fp32, kv_b [heads, nope + value, kv_lora] -> [T, heads, value] fp32.
    """
    out = context.new_empty(*context.shape[:2], shape.value)  # [heads, T, value]
    for heads, w_uv in _widened_heads(kv_b[:, shape.nope :], shape.heads):
        out[heads] = torch.bmm(context[heads], w_uv.transpose(1, 2))  # [g, T, value]
    return out.transpose(0, 1)


def _widened_heads(kv_b: Tensor, at_most: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield which heads, and their matrices in fp32: at most so many, and few enough for one block.

    Shapes: kv_b [heads, n, kv_lora] -> [g, n, kv_lora] each.
    """
    group = min(at_most, max(1, _block_numbers(kv_b.device) // kv_b[0].numel()))
    for start in range(0, len(kv_b), group):
        heads = slice(start, min(start + group, len(kv_b)))
        yield heads, kv_b[heads].float()


def _block_numbers(device: torch.device) -> int:
    """How many numbers to widen at once: on the host what caches hold, elsewhere what makes for few kernel launches."""
    room = WORK_BYTES // FP32_BYTES
    return min(WIDENED_NUMBERS, room) if device.type == "cpu" else room


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

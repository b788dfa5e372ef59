"""Absorbed latent attention of single new tokens over the paged latent cache, with the keys cut into splits.

attend     one program per row, heads and split: a partial context with its highest score and sum ("flash decoding")
combine    the partials of a row and head, relative to the highest score of all, in ascending order

A latent is c | k_rope, both in the cache's bf16; queries and softmax weights enter the tensor cores as bf16, everything
else is fp32. How a row's keys are cut depends on its own length alone, so that its bits do not depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_k2.accelerator.kernels.bf16 import FUSED, dot, to_bf16

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiling:
    """Choose heads and keys of a tile, most splits of a row (a power of two), fewest keys of a split, and launch."""

    heads: int
    keys: int
    splits: int
    split_keys: int
    warps: int
    stages: int


# Never timed on a GPU: what fits the shared memory of a card without spilled registers.
SMALL = Tiling(heads=16, keys=32, splits=64, split_keys=64, warps=4, stages=2)  # 55 KB
TILINGS = {
    9: Tiling(heads=64, keys=32, splits=128, split_keys=64, warps=8, stages=2),  # 144 KB
    10: Tiling(heads=32, keys=32, splits=128, split_keys=64, warps=8, stages=2),  # 74 KB
}


def tiling_for(capability: int) -> Tiling:
    """Choose for a card by the first number of its compute capability."""
    return TILINGS.get(capability, SMALL)


@triton.jit
def _split_keys(length, SPLITS: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr):
    """Return the keys of each split of a row."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS, LEAST)


@triton.jit
def attend_kernel(
    q,
    cache,
    page_table,
    first_pages,
    lengths,
    contexts,
    peaks,
    totals,
    scale,
    HEADS: tl.constexpr,
    LORA: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend from TILE_HEADS heads of one row to the keys of one split."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths + row)
    size = _split_keys(length, SPLITS, KEYS, SPLIT_KEYS)
    first = split * size
    if first < length:
        head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
        head_used = head < HEADS
        column, rope = tl.arange(0, LORA), tl.arange(0, ROPE)
        at = q + (row * HEADS + head)[:, None] * (LORA + ROPE)
        q_c = tl.load(at + column[None, :], mask=head_used[:, None], other=0.0)
        q_rope = tl.load(at + LORA + rope[None, :], mask=head_used[:, None], other=0.0)
        if q.dtype.element_ty == tl.float32:
            q_c, q_rope = to_bf16(q_c), to_bf16(q_rope)
        pages = page_table + tl.load(first_pages + row)
        in_page = tl.arange(0, KEYS)[:, None] * (LORA + ROPE)
        c_at, rope_at = in_page + column[None, :], in_page + LORA + rope[None, :]
        peak = tl.full((TILE_HEADS,), -float("inf"), tl.float32)
        total = tl.zeros((TILE_HEADS,), tl.float32)
        context = tl.zeros((TILE_HEADS, LORA), tl.float32)
        for start in tl.range(first, tl.minimum(first + size, length), KEYS, num_stages=STAGES):
            page = tl.load(pages + start // PAGE).to(tl.int64)
            key = start + tl.arange(0, KEYS)
            key_used = key < length
            latents = cache + (page * PAGE + start % PAGE) * (LORA + ROPE)
            # What lies behind the last token was never written and may be a NaN.
            c = tl.load(latents + c_at, mask=key_used[:, None], other=0.0)
            k_rope = tl.load(latents + rope_at, mask=key_used[:, None], other=0.0)
            scores = dot(q_c, tl.trans(c), tl.zeros((TILE_HEADS, KEYS), tl.float32))
            scores = dot(q_rope, tl.trans(k_rope), scores) * scale
            scores = tl.where(key_used[None, :], scores, -float("inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(peak - higher)
            total = total * shrink + tl.sum(weights, 1)
            context = dot(to_bf16(weights), c, context * shrink[:, None])
            peak = higher
        partial = (row * SPLITS + split) * HEADS + head
        tl.store(contexts + partial[:, None] * LORA + column[None, :], context, mask=head_used[:, None])
        tl.store(peaks + partial, peak, mask=head_used)
        tl.store(totals + partial, total, mask=head_used)


@triton.jit
def combine_kernel(
    contexts,
    peaks,
    totals,
    lengths,
    out,
    HEADS: tl.constexpr,
    LORA: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Add the partial contexts of one row and head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    splits = tl.cdiv(length, _split_keys(length, SPLITS, KEYS, SPLIT_KEYS))
    column = tl.arange(0, LORA)
    split = tl.arange(0, SPLITS)
    all_peaks = tl.load(peaks + (row * SPLITS + split) * HEADS + head, mask=split < splits, other=-float("inf"))
    peak = tl.max(all_peaks, 0)
    total = 0.0
    context = tl.zeros((LORA,), tl.float32)
    for i in range(splits):
        partial = (row * SPLITS + i) * HEADS + head
        share = tl.exp2(tl.load(peaks + partial) - peak)
        total += tl.load(totals + partial) * share
        context += tl.load(contexts + partial * LORA + column) * share
    result = context / total
    if out.dtype.element_ty == tl.bfloat16:
        result = to_bf16(result)
    tl.store(out + (row * HEADS + head) * LORA + column, result)


def mla_decode(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    first_pages: Tensor,
    lengths: Tensor,
    scale: float,
    kv_lora: int,
    tiling: Tiling | None = None,
) -> Tensor:
    """Attend from each row to the first `length` tokens of its pages.

    A row is one new token whose latent is already in the cache; rows of one sequence share its entries of the table.
    Shapes: q [R, heads, kv_lora + rope], absorbed and rotated, bf16 or fp32; cache bf16 [pages, page_tokens, kv_lora +
    rope]; page_table int32 [P]; first_pages, lengths int32 [R], the row's first entry in the table and its tokens, at
    least one -> contexts [R, heads, kv_lora] fp32.
    Effects: allocates R * splits * heads * kv_lora numbers in fp32.
    Raises: ValueError for sizes that are no powers of two, or do not belong together.
    """
    if tiling is None:
        tiling = tiling_for(torch.cuda.get_device_capability(q.device)[0]) if q.is_cuda else SMALL
    rows, heads, size = q.shape
    _check(q, cache, kv_lora, tiling)
    contexts = q.new_empty(rows, tiling.splits, heads, kv_lora, dtype=torch.float32)
    peaks = q.new_empty(rows, tiling.splits, heads, dtype=torch.float32)
    totals = torch.empty_like(peaks)
    out = q.new_empty(rows, heads, kv_lora, dtype=torch.float32)
    common = {"HEADS": heads, "LORA": kv_lora, "SPLITS": tiling.splits, "SPLIT_KEYS": tiling.split_keys}
    sizes = {"ROPE": size - kv_lora, "PAGE": cache.shape[1], "TILE_HEADS": tiling.heads, "STAGES": tiling.stages}
    attend_kernel[rows, triton.cdiv(heads, tiling.heads), tiling.splits](
        q, cache, page_table, first_pages, lengths, contexts, peaks, totals, scale * LOG2_E,
        **common, **sizes, KEYS=tiling.keys, num_warps=tiling.warps, **FUSED,
    )  # fmt: skip
    combine_kernel[rows, heads](contexts, peaks, totals, lengths, out, **common, KEYS=tiling.keys, **FUSED)
    return out


def _check(q: Tensor, cache: Tensor, kv_lora: int, tiling: Tiling) -> None:
    size = q.shape[2]
    for name, number in (("kv_lora", kv_lora), ("rope", size - kv_lora), ("page", cache.shape[1])):
        if number < 16 or number & (number - 1):
            raise ValueError(f"{name}: expected a power of two from 16 on, got {number}")
    if cache.dtype != torch.bfloat16 or cache.shape[2] != size or not (cache.is_contiguous() and q.is_contiguous()):
        raise ValueError(f"cache: expected contiguous bf16 [.., .., {size}], got {cache.dtype} {list(cache.shape)}")
    if cache.shape[1] % tiling.keys or tiling.split_keys % tiling.keys:
        raise ValueError(f"page: expected a multiple of {tiling.keys} tokens, got {cache.shape[1]}")

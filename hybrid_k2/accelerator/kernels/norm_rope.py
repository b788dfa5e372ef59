"""The small steps between attention's products: RMSNorm, rotation of queries and keys, latents into the cache.

The order of roundings is that of `hybrid_k2/model/layers.py` and `rope.py`: statistics in fp32, the normal rounded to
the input's dtype before it meets the weight; rotations in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_k2.accelerator.kernels.bf16 import FUSED, to_bf16

ROTATED_HEADS = 16  # of one program


@triton.jit
def _rounded(x, like):
    """Round to the dtype that a pointer points at."""
    if like.dtype.element_ty == tl.bfloat16:
        return to_bf16(x).to(tl.float32)
    else:
        return x


@triton.jit
def _normal(x, column, weight, size, eps, like):
    """Normalise one row, zero behind its end."""
    root = tl.sqrt_rn(tl.sum(x * x, 0) / size + eps)
    gain = _rounded(tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32), like)
    return _rounded(_rounded(x * (1.0 / root), like) * gain, like)


@triton.jit
def rms_norm_kernel(x, weight, out, size, eps, COLUMNS: tl.constexpr):
    """Normalise one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    used = column < size
    values = tl.load(x + row * size + column, mask=used, other=0.0).to(tl.float32)
    result = _normal(values, column, weight, size, eps, x)
    tl.store(out + row * size + column, to_bf16(result) if out.dtype.element_ty == tl.bfloat16 else result, mask=used)


@triton.jit
def _rotate(source, target, angle_row, cos, sin, mask, pair, PAIRS: tl.constexpr):
    """Rotate pairs (2i, 2i + 1) from one place to another."""
    c, s = tl.load(cos + angle_row * PAIRS + pair), tl.load(sin + angle_row * PAIRS + pair)
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + 1, mask=mask, other=0.0).to(tl.float32)
    first, second = a * c - b * s, a * s + b * c
    if target.dtype.element_ty == tl.bfloat16:
        first, second = to_bf16(first), to_bf16(second)
    tl.store(target, first, mask=mask)
    tl.store(target + 1, second, mask=mask)


@triton.jit
def append_rotate_kernel(
    latents,
    weight,
    cos,
    sin,
    slots,
    cache,
    q,
    q_token,
    q_head,
    q_out,
    out_token,
    out_head,
    eps,
    heads,
    LORA: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Write one token's latent into the cache (the first program of a token), or rotate some of its queries.

    A token with a slot below zero leaves the cache as it is.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    if part == 0:
        size = LORA + 2 * PAIRS
        column = tl.arange(0, COLUMNS)
        used = column < LORA
        values = tl.load(latents + token * size + column, mask=used, other=0.0).to(tl.float32)
        normal = _normal(values, column, weight, LORA, eps, latents)
        number = tl.load(slots + token).to(tl.int64)
        slot, kept = cache + number * size, number >= 0
        result = to_bf16(normal) if cache.dtype.element_ty == tl.bfloat16 else normal
        tl.store(slot + column, result, mask=used & kept)
        key = 2 * pair + LORA
        _rotate(latents + token * size + key, slot + key, token, cos, sin, (pair < PAIRS) & kept, pair, PAIRS)
    else:
        head = (part - 1) * ROTATED + tl.arange(0, ROTATED)[:, None]
        source = q + token * q_token + head * q_head + 2 * pair[None, :]
        rotated = q_out + token * out_token + head * out_head + 2 * pair[None, :]
        _rotate(source, rotated, token, cos, sin, (head < heads) & (pair < PAIRS)[None, :], pair[None, :], PAIRS)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide rows by their root mean square and multiply with the weight.

    Shapes: x [T, n] bf16 or fp32, weight [n] -> [T, n] in x's dtype.
    """
    x, size = x.contiguous(), x.shape[1]
    out = torch.empty_like(x)
    columns = triton.next_power_of_2(size)
    rms_norm_kernel[len(x),](x, weight, out, size, eps, COLUMNS=columns, num_warps=8 if columns > 1024 else 4, **FUSED)
    return out


def append_and_rotate(
    latents: Tensor,
    norm: Tensor,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    slots: Tensor,
    cache: Tensor,
    q_rope: Tensor,
    q_out: Tensor,
) -> None:
    """Normalise and rotate new latents into the cache, and rotate the queries, in one launch.

    Shapes: latents [T, kv_lora + rope] bf16 or fp32, as kv_a gives them; norm [kv_lora]; rotation: cos and sin [T,
    rope/2] fp32; slots int32 [T], page * page_tokens + place in the page, or -1; cache [pages, page_tokens, kv_lora +
    rope]; q_rope, q_out [T, heads, rope], views with consecutive last columns, such as those of absorbed queries.
    Effects: writes `cache` and `q_out`.
    Raises: ValueError for a rope of no power of two, or tensors that are not contiguous.
    """
    tokens, heads, rope = q_rope.shape
    lora = latents.shape[1] - rope
    pairs = rope // 2
    if rope < 2 or rope & (rope - 1):
        raise ValueError(f"rope: expected a power of two, got {rope}")
    if not (latents.is_contiguous() and cache.is_contiguous() and q_rope.stride(2) == q_out.stride(2) == 1):
        raise ValueError("latents, cache, queries: expected consecutive columns, got others")
    append_rotate_kernel[tokens, 1 + triton.cdiv(heads, ROTATED_HEADS)](
        latents, norm, *rotation, slots, cache, q_rope, q_rope.stride(0), q_rope.stride(1),
        q_out, q_out.stride(0), q_out.stride(1), eps, heads,
        LORA=lora, COLUMNS=triton.next_power_of_2(lora), PAIRS=pairs, ROTATED=ROTATED_HEADS, **FUSED,
    )  # fmt: skip

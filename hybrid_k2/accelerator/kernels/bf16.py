"""Rounding to bf16 and products of bf16 tiles, for kernels that must also run in Triton's interpreter.

The interpreter (seen in 3.6 and 3.9) keeps bf16 as 16-bit integers: it cuts fp32 off instead of rounding it, and
multiplies the integers. Widening is right. So both operations take a way around there; compiled code does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

# For every launch: products and sums may become one instruction. Triton 3.9 warns where that is not said.
FUSED = {"enable_fp_fusion": True}
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_bf16(x):
    """Round fp32 to bf16, to nearest even."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x).to(tl.bfloat16)  # noqa: PLR0124 (a NaN stays one)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def dot(a, b, sums):
    """Add the product of two bf16 tiles to fp32 sums."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums)


@triton.jit
def dot_wide(a, x, sums):
    """Add the product of a bf16 tile and a tile of bf16 or fp32 to fp32 sums.

    fp32 is split into two bf16 numbers: 16 bits of each value count.
    """
    if x.dtype == tl.float32:
        high = to_bf16(x)
        low = to_bf16(x - high.to(tl.float32))
        return dot(a, low, dot(a, high, sums))
    else:
        return dot(a, x, sums)

"""Pack activations into the A16 form of the host's expert kernels; see docs/kernels.md and csrc/kernels/a16.h.

A group of 32 activations becomes 72 bytes: 32 high bytes, 32 low bytes, (k + 60) << 23 and -8 * sum(n) as int32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_k2.accelerator.kernels.bf16 import FUSED

GROUP = 32
GROUP_BYTES = 72
GROUPS_AT_ONCE = 16


@triton.jit
def pack_a16_kernel(x, planes, words, fits, groups, GROUPS: tl.constexpr):
    """Pack GROUPS groups of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    used = group < groups
    lane = tl.arange(0, 32)
    at = (row * groups + group)[:, None] * 32 + lane[None, :]
    values = tl.load(x + at, mask=used[:, None], other=0.0).to(tl.float32)
    # On the bit patterns a NaN is larger than every number. 32512 = 1.984375 * 2^14, and 0x1ffff carries into the
    # exponent where the mantissa is above 1.984375.
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    k = (((largest.to(tl.uint32, bitcast=True) + 0x1FFFF) >> 23).to(tl.int32)) - 141
    fit = k <= 60
    k = tl.where(fit, tl.maximum(k, -59), 0)
    inverse = ((127 - k) << 23).to(tl.float32, bitcast=True)
    # Adding 1.5 * 2^23 rounds to a whole number, to nearest even.
    whole = (tl.where(fit[:, None], values, 0.0) * inverse[:, None] + 12582912.0) - 12582912.0
    n = whole.to(tl.int32)
    high = (n + 128) >> 8
    byte = (row * groups + group)[:, None] * 72 + lane[None, :]
    tl.store(planes + byte, high.to(tl.int8), mask=used[:, None])
    tl.store(planes + byte + 32, (n - (high << 8)).to(tl.int8), mask=used[:, None])
    word = (row * groups + group) * 18 + 16
    tl.store(words + word, (k + 60) << 23, mask=used)
    tl.store(words + word + 1, -8 * tl.sum(n, 1), mask=used)
    tl.store(fits + row * groups + group, fit.to(tl.int8), mask=used)


def pack_a16(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pack rows; a group with a NaN, an infinity or a magnitude above 32512 * 2^60 becomes zeros and does not fit.

    Shapes: x [T, H] bf16 or fp32, H a multiple of 32 -> uint8 [T, H/32, 72], fits bool [T, H/32].
    Raises: ValueError for another width.
    """
    rows, width = x.shape
    if width % GROUP:
        raise ValueError(f"x: expected a multiple of {GROUP} columns, got {width}")
    groups = width // GROUP
    packed = torch.empty(rows, groups, GROUP_BYTES, dtype=torch.uint8, device=x.device)
    fits = torch.empty(rows, groups, dtype=torch.int8, device=x.device)
    grid = (rows, triton.cdiv(groups, GROUPS_AT_ONCE))
    planes, words = packed.view(torch.int8), packed.view(torch.int32)
    pack_a16_kernel[grid](x.contiguous(), planes, words, fits, groups, GROUPS=GROUPS_AT_ONCE, **FUSED)
    return packed, fits.bool()

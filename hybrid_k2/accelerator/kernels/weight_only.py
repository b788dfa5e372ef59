"""Dense layers whose weights alone are narrow: int8 with a scale per 32 inputs, and fp8 with a scale per row.

Layout of a matrix [out, in] on the card, both sizes multiples of 32, in blocks of 32 rows by 32 inputs:

    values   int8 or float8_e4m3fn [out/32, in/32, 32 rows, 32 inputs], so that a tile of rows is read front to back
    scales   int8: bf16 [out/32, in/32, 32 rows];  fp8: fp32 [out]

exact      (decode) the numbers enter the tensor cores as bf16, which holds them exactly; scales multiply sums in fp32.
rounded    (prefill) int8 enters as bf16(value * scale). With fp8 there is no difference.

A matrix with few rows is cut along its inputs, too, into parts whose sums are added in a fixed order. The cuts depend
on the matrix alone, so that a row's bits do not depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_k2.accelerator.kernels.bf16 import FUSED, dot_wide, to_bf16
from hybrid_k2.dense import Int8Weight

BLOCK = 32
FP8_LARGEST = 448.0
PROGRAMS = 264  # two for each multiprocessor of an H100: below that, inputs are cut
ADD_NUMBERS = 1024


@dataclass(frozen=True)
class WeightOnly:
    """Hold a matrix in the layout of this file: int8 where `scales` is bf16, fp8 where it is fp32."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and inputs."""
        return self.values.shape[0] * BLOCK, self.values.shape[1] * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes on the card."""
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """Return the matrix in fp32, which is exact.

        Shapes: -> [out, in].
        """
        values = self.values.float()  # [out/32, in/32, 32, 32]
        if self.scales.dtype == torch.bfloat16:
            values = values * self.scales.float().unsqueeze(-1)
        plain = values.transpose(1, 2).reshape(self.shape)
        return plain if self.scales.dtype == torch.bfloat16 else plain * self.scales.unsqueeze(-1)


def from_int8(weight: Int8Weight) -> WeightOnly:
    """Bring the host's int8 form, [out, in] with scales [out, in/32], into this layout; no bit changes.

    Raises: ValueError for sizes that are no multiples of 32.
    """
    scales = weight.scale.view(-1, BLOCK, weight.scale.shape[1]).transpose(1, 2).contiguous()
    return WeightOnly(_blocks(weight.values), scales)


def quantize_fp8(weight: Tensor) -> WeightOnly:
    """Round a matrix to fp8 (e4m3): a row's scale is its largest magnitude / 448.

    Shapes: weight [out, in].
    Raises: ValueError for sizes that are no multiples of 32, or values that are not finite.
    """
    wide = weight.float()
    largest = wide.abs().amax(-1)
    if not bool(largest.isfinite().all()):
        raise ValueError("weight: expected finite values, got NaN or infinity")
    scales = torch.where(largest == 0, 1.0, largest / FP8_LARGEST)
    return WeightOnly(_blocks((wide / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)), scales)


def _blocks(values: Tensor) -> Tensor:
    rows, inputs = values.shape
    if rows % BLOCK or inputs % BLOCK:
        raise ValueError(f"weight: expected sizes that are multiples of {BLOCK}, got {[rows, inputs]}")
    return values.view(rows // BLOCK, BLOCK, inputs // BLOCK, BLOCK).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Tiling:
    """Choose a tile (rows, tokens, blocks of 32 inputs per step: powers of two), its form and its launch."""

    rows: int
    tokens: int
    blocks: int
    exact: bool
    warps: int
    stages: int

    def fit(self, rows: int, inputs: int, grouped: bool) -> tuple[int, int, dict[str, int | bool]]:
        """Return a tile's rows, the parts along the inputs, and the arguments of a launch."""
        tile_rows, blocks = gcd(rows, self.rows), gcd(inputs // BLOCK, self.blocks)
        steps = inputs // BLOCK // blocks
        wanted = max(1, PROGRAMS // (rows // tile_rows))
        parts = max(n for n in range(1, min(wanted, steps) + 1) if steps % n == 0) if self.exact else 1
        arguments = {"OUT": rows, "INPUTS": inputs, "PARTS": parts, "ROWS": tile_rows, "TOKENS": self.tokens}
        form = {"BLOCKS": blocks, "GROUPED": grouped, "EXACT": self.exact, "STAGES": self.stages}
        return tile_rows, parts, {**arguments, **form, "num_warps": self.warps, **FUSED}


# Never timed on a GPU.
DECODE = Tiling(rows=64, tokens=16, blocks=4, exact=True, warps=4, stages=3)
PREFILL = Tiling(rows=128, tokens=128, blocks=2, exact=False, warps=8, stages=3)


@triton.jit
def weight_only_kernel(
    values,
    scales,
    shifts,
    x,
    out,
    tokens,
    OUT: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPED: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply ROWS rows of one part of the matrix with TOKENS rows of x, into out [part, token, row]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    used = token < tokens
    part = tl.program_id(2)
    all_blocks = INPUTS // 32
    blocks = all_blocks // PARTS
    k = tl.arange(0, 32)
    row_block = (row // 32).to(tl.int64) * all_blocks + part * blocks
    tile_values = values + row_block[:, None] * 1024 + (row % 32 * 32)[:, None] + k[None, :]
    scale_words = scales + row_block * 16 + row % 32 // 2
    # Which half of a word is a row's scale. From memory, see int4_experts.py.
    shift = tl.load(shifts + row % 32)
    tile_x = x + tl.where(used, token, 0).to(tl.int64)[None, :] * INPUTS + part * blocks * 32 + k[:, None]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, blocks, BLOCKS, num_stages=STAGES):
        for block in tl.static_range(BLOCKS):
            value = tl.load(tile_values + (step + block) * 1024).to(tl.float32)
            tile = tl.load(tile_x + (step + block) * 32)
            if GROUPED:
                pair = tl.load(scale_words + (step + block) * 16)
                scale = ((pair << shift) & -65536).to(tl.float32, bitcast=True)[:, None]
                if EXACT:
                    sums += dot_wide(to_bf16(value), tile, tl.zeros((ROWS, TOKENS), tl.float32)) * scale
                else:
                    sums = dot_wide(to_bf16(value * scale), tile, sums)
            else:
                sums = dot_wide(to_bf16(value), tile, sums)
    if not GROUPED:
        sums = sums * tl.load(scales + row)[:, None]
    if out.dtype.element_ty == tl.bfloat16:
        sums = to_bf16(sums)
    at = out + (part * tokens + token).to(tl.int64)[None, :] * OUT + row[:, None]
    tl.store(at, sums, mask=used[None, :])


@triton.jit
def add_parts_kernel(partial, out, numbers, PARTS: tl.constexpr, NUMBERS: tl.constexpr):
    """Add the parts of each number, in ascending order."""
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    used = at < numbers
    total = tl.zeros((NUMBERS,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + part * numbers + at, mask=used, other=0.0)
    if out.dtype.element_ty == tl.bfloat16:
        total = to_bf16(total)
    tl.store(out + at, total, mask=used)


def weight_only_linear(x: Tensor, weight: WeightOnly, tiling: Tiling = DECODE) -> Tensor:
    """Multiply rows; choose `PREFILL` for many.

    A row's bits depend on that row, the matrix and the tiling alone. fp8 needs a card from sm_89 on.
    Shapes: x [T, in], bf16 or fp32 -> [T, out] in x's dtype.
    Raises: ValueError for another width.
    """
    rows, inputs = weight.shape
    if x.shape[1] != inputs:
        raise ValueError(f"x: expected {inputs} inputs, got {x.shape[1]}")
    x, tokens = x.contiguous(), len(x)
    out = x.new_empty(tokens, rows)
    grouped = weight.scales.dtype == torch.bfloat16
    tile_rows, parts, launch = tiling.fit(rows, inputs, grouped)
    target = out if parts == 1 else x.new_empty(parts, tokens, rows, dtype=torch.float32)
    scales = weight.scales.view(torch.int32) if grouped else weight.scales
    grid = (rows // tile_rows, triton.cdiv(tokens, tiling.tokens), parts)
    weight_only_kernel[grid](weight.values, scales, _shifts(x.device), x, target, tokens, **launch)
    if parts > 1:
        count = tokens * rows
        add_parts_kernel[triton.cdiv(count, ADD_NUMBERS),](
            target, out, count, PARTS=parts, NUMBERS=ADD_NUMBERS, **FUSED
        )
    return out


@cache
def _shifts(device: torch.device) -> Tensor:
    """How far left the scale of each of 32 rows must go: a word has two, that of the even row in its low half."""
    return torch.tensor([16, 0] * 16, dtype=torch.int32, device=device)

"""Routed experts on the GPU: grouped products that read INT4 weights in layout L32, as the host keeps them.

gate_up    rows of the hidden state times the fused w13 of the tile's expert, then silu(gate) * up
down       that times w2 and the routing weight, one row per assignment
combine    the rows of a token added, by ascending expert, so that a result does not depend on any timing

Products are transposed (weights times tokens), so that 16 tokens fill a tensor-core tile whose other side is rows.

exact      (decode) whole numbers -8..7 enter the product, which is exact in bf16; the sum over a group of 32 inputs is
           multiplied with the scale in fp32. fp32 activations enter as two bf16 numbers, and the intermediate is fp32.
rounded    (prefill) bf16(value * scale) enters and sums stay in the tensor cores; the intermediate is bf16.
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
from hybrid_k2.accelerator.kernels.grouping import Grouping

GROUP = 32
ROW_BLOCK = 32
BLOCK_BYTES = 576
BLOCK_WORDS = tl.constexpr(144)  # of 32 bits: 16 of scales, 128 of values
SCALE_WORDS = tl.constexpr(16)
COMBINE_COLUMNS = 1024


@dataclass(frozen=True)
class Tiling:
    """Choose a product's tile (rows, tokens, groups of 32 inputs per step: powers of two) and its launch."""

    rows: int
    tokens: int
    groups: int
    exact: bool
    warps: int
    stages: int

    def fit(self, rows: int, inputs: int) -> tuple[int, dict[str, int | bool]]:
        """Return the rows of a tile and the arguments of a launch for a matrix of this size: tiles must divide it."""
        tile_rows, groups = gcd(rows, self.rows), gcd(inputs // GROUP, self.groups)
        arguments = {"ROWS": tile_rows, "TOKENS": self.tokens, "GROUPS": groups, "EXACT": self.exact}
        return tile_rows, {**arguments, "STAGES": self.stages, "num_warps": self.warps, **FUSED}


# Never timed on a GPU: sizes that fit the shared memory of every card from sm_80 on, without spilled registers.
DECODE = Tiling(rows=64, tokens=16, groups=4, exact=True, warps=4, stages=3)
PREFILL = Tiling(rows=128, tokens=128, groups=2, exact=False, warps=8, stages=3)


def expert_bytes(hidden: int, intermediate: int) -> int:
    """Return the size of one expert: w13 and then w2 in layout L32."""
    return 3 * intermediate // ROW_BLOCK * (hidden // GROUP) * BLOCK_BYTES


@triton.jit
def _multiply(
    words,
    x,
    shifts,
    row,
    token_row,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply rows of one L32 matrix with rows of x: [ROWS, TOKENS] fp32.

    Inside a group, inputs are taken in the order [pair of nibbles 0..3][word 0..3][nibble of the pair], in which a
    thread of a tensor core's tile needs the nibbles of one word: weights go from memory to the product in registers.
    """
    groups = INPUTS // 32
    block = words + (row // 32).to(tl.int64) * (groups * BLOCK_WORDS)
    value_words = block[:, None] + SCALE_WORDS + tl.arange(0, 4)[None, :] * 32 + (row % 32)[:, None]
    scale_words = block + row % 16
    # The shifts of nibbles, [1, 4, 1, 2], and of scales. From memory: Triton unpacks in the product's layout only what
    # it can trace back to loads.
    scale_shift = tl.load(shifts + 8 + row % 32)
    shift = tl.load(shifts + tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :])[None, :, None, :]
    k = tl.arange(0, 32)
    input = tl.multiple_of(tl.max_contiguous(k // 2 % 4 * 8 + k // 8 * 2 + k % 2, 2), 2)
    x_tile = x + token_row.to(tl.int64)[None, :] * INPUTS + input[:, None]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, groups, GROUPS, num_stages=STAGES):
        for part in tl.static_range(GROUPS):
            group = step + part
            packed = tl.load(value_words + group * BLOCK_WORDS)
            scale_pair = tl.load(scale_words + group * BLOCK_WORDS)
            tile = tl.load(x_tile + group * 32)
            # 2^23 + nibble, made of bits: a conversion of integers runs at a quarter of the rate.
            nibble = (packed[:, None, :, None] >> shift) & 15
            value = tl.reshape((nibble | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0, (ROWS, 32))
            scale = ((scale_pair << scale_shift) & -65536).to(tl.float32, bitcast=True)[:, None]
            if EXACT:
                sums += dot_wide(to_bf16(value), tile, tl.zeros((ROWS, TOKENS), tl.float32)) * scale
            else:
                sums = dot_wide(to_bf16(value * scale), tile, sums)
    return sums


@triton.jit
def gate_up_kernel(
    words,
    shifts,
    slot_words,
    x,
    order,
    tile_slot,
    tile_first,
    tile_stop,
    inner,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute silu(gate) * up of one tile of positions and ROWS/2 channels."""
    tile = tl.program_id(1)
    first, stop = tl.load(tile_first + tile), tl.load(tile_stop + tile)
    if first < stop:
        position = first + tl.arange(0, TOKENS)
        used = position < stop
        token = tl.load(order + position, mask=used, other=0) // K
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        base = words + tl.load(tile_slot + tile).to(tl.int64) * slot_words
        sums = _multiply(base, x, shifts, row, token, HIDDEN, ROWS, TOKENS, GROUPS, EXACT, STAGES)
        # Of 32 rows, 16 are gate rows and 16 the matching up rows.
        halves = tl.permute(tl.reshape(sums, (ROWS // 32, 2, 16, TOKENS)), (0, 2, 3, 1))
        gate, up = tl.split(halves)
        active = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (ROWS // 2, TOKENS))
        if inner.dtype.element_ty == tl.bfloat16:
            active = to_bf16(active)
        channel = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        at = inner + position.to(tl.int64)[None, :] * INTERMEDIATE + channel[:, None]
        tl.store(at, active, mask=used[None, :])


@triton.jit
def down_kernel(
    words,
    shifts,
    slot_words,
    inner,
    order,
    weights,
    tile_slot,
    tile_first,
    tile_stop,
    partial,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute ROWS outputs of one tile of positions, times the routing weights, into the rows of their assignments."""
    tile = tl.program_id(1)
    first, stop = tl.load(tile_first + tile), tl.load(tile_stop + tile)
    if first < stop:
        position = first + tl.arange(0, TOKENS)
        used = position < stop
        read = tl.where(used, position, first)  # what is computed in an unused column is not stored
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        w2 = 2 * INTERMEDIATE // 32 * (HIDDEN // 32) * BLOCK_WORDS
        base = words + tl.load(tile_slot + tile).to(tl.int64) * slot_words + w2
        sums = _multiply(base, inner, shifts, row, read, INTERMEDIATE, ROWS, TOKENS, GROUPS, EXACT, STAGES)
        assignment = tl.load(order + position, mask=used, other=0)
        weight = tl.load(weights + assignment, mask=used, other=0.0)
        at = partial + assignment.to(tl.int64)[None, :] * HIDDEN + row[:, None]
        tl.store(at, sums * weight[None, :], mask=used[None, :])


@triton.jit
def combine_kernel(partial, slots, out, HIDDEN: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Add the rows of one token's assignments to its output, in order; those computed elsewhere have none."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < HIDDEN
    at = out + token * HIDDEN + column
    total = tl.load(at, mask=used, other=0.0)
    for k in tl.static_range(K):
        width = tl.where(tl.load(slots + token * K + k) >= 0, HIDDEN, 0)
        total += tl.load(partial + (token * K + k) * HIDDEN + column, mask=column < width, other=0.0)
    tl.store(at, total, mask=used)


def add_experts(
    out: Tensor, x: Tensor, experts: Tensor, grouping: Grouping, intermediate: int, tiling: Tiling | None = None
) -> None:
    """Add the weighted outputs of the experts that lie in `experts` to `out`.

    A row's bits depend on that row and the tiling alone, not on the rest of the batch.
    Shapes: x [T, H] bf16 (or fp32); experts uint8 [slots, expert_bytes], each w13 (gate and up fused) and w2 in L32;
    out [T, H] fp32; H and intermediate multiples of 32.
    Effects: allocates T*K rows of H numbers in fp32 and of the intermediate; split long prompts by tokens.
    Raises: ValueError for sizes that do not belong together.
    """
    tiling = tiling or (DECODE if grouping.tile_tokens == DECODE.tokens else PREFILL)
    hidden, top_k = x.shape[1], grouping.slots.shape[1]
    _check(out, x, experts, grouping, intermediate, tiling)
    words, tiles = experts.view(torch.int32), len(grouping.tile_slot)
    inner_dtype = torch.float32 if tiling.exact else torch.bfloat16
    inner = x.new_empty(grouping.order.numel(), intermediate, dtype=inner_dtype)  # [positions, I]
    partial = x.new_empty(grouping.order.numel(), hidden, dtype=torch.float32)  # [assignments, H]
    of_tiles = (grouping.tile_slot, grouping.tile_first, grouping.tile_stop)
    packed = (words, _shifts(x.device), words.stride(0))
    sizes = {"HIDDEN": hidden, "INTERMEDIATE": intermediate}
    rows, launch = tiling.fit(2 * intermediate, hidden)
    gate_up_kernel[2 * intermediate // rows, tiles](
        *packed, x, grouping.order, *of_tiles, inner, K=top_k, **sizes, **launch
    )
    rows, launch = tiling.fit(hidden, intermediate)
    down_kernel[hidden // rows, tiles](
        *packed, inner, grouping.order, grouping.weights, *of_tiles, partial, **sizes, **launch
    )
    grid = (len(x), triton.cdiv(hidden, COMBINE_COLUMNS))
    combine_kernel[grid](partial, grouping.slots, out, HIDDEN=hidden, K=top_k, COLUMNS=COMBINE_COLUMNS, **FUSED)


@cache
def _shifts(device: torch.device) -> Tensor:
    """Where the nibbles of a word lie, and how far left the bf16 scale of each of 32 rows must go.

    Byte j of a word holds input j in its low half and input 4 + j in its high half. A word of scales holds that of row
    i in its low half and that of row 16 + i in its high half.
    """
    nibbles = [8 * (n % 4) + 4 * (n // 4) for n in range(8)]
    return torch.tensor(nibbles + [16] * 16 + [0] * 16, dtype=torch.int32, device=device)


def _check(out: Tensor, x: Tensor, experts: Tensor, grouping: Grouping, intermediate: int, tiling: Tiling) -> None:
    hidden, size = x.shape[1], expert_bytes(x.shape[1], intermediate)
    if hidden % GROUP or intermediate % ROW_BLOCK:
        raise ValueError(f"experts: expected sizes that are multiples of 32, got {hidden} and {intermediate}")
    if experts.dtype != torch.uint8 or experts.shape[1:] != (size,) or not experts.is_contiguous():
        raise ValueError(
            f"experts: expected contiguous uint8 [slots, {size}], got {experts.dtype} {list(experts.shape)}"
        )
    if out.dtype != torch.float32 or out.shape != x.shape or not (out.is_contiguous() and x.is_contiguous()):
        raise ValueError(f"out: expected contiguous fp32 {list(x.shape)}, got {out.dtype} {list(out.shape)}")
    if grouping.tile_tokens != tiling.tokens or len(grouping.slots) != len(x):
        raise ValueError(
            f"grouping: expected {len(x)} tokens in tiles of {tiling.tokens}, "
            f"got {len(grouping.slots)} in tiles of {grouping.tile_tokens}"
        )

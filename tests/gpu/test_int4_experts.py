"""Grouped INT4 experts against float64 on the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_k2.accelerator.kernels.grouping import group_tokens
from tests.gpu.l32_experts import expected_sums, random_l32
from tests.unit.experts_common import random_routing

pytest.importorskip("triton", reason="triton is not installed")
from hybrid_k2.accelerator.kernels.int4_experts import DECODE, PREFILL, Tiling, add_experts

# What the roundings cost, relative to the norm of an expert's output. exact: an fp32 activation enters as two bf16
# numbers, 2^-18, and sums of up to 7168 fp32 numbers round. rounded: weights and intermediate have 8 bits, each
# 2^-9 / sqrt(3) in the root mean square over mantissas at most; gate and up each carry the weights' error, silu may
# double it, and down has the weights' and the intermediate's.
EXACT_ERROR = 2e-5
ROUNDED_ERROR = 2 * 2**-9 / 3**0.5 * (2 * 2**2 + 2) ** 0.5


def compare(
    device: torch.device, tiling: Tiling, sizes: tuple[int, int], tokens: int, experts: int, dtype: torch.dtype
) -> None:
    hidden, intermediate = sizes
    packed_experts, packed = random_l32(3, hidden, intermediate)
    slot_of_expert = torch.full((experts,), -1, dtype=torch.int32)
    slot_of_expert[torch.randperm(experts)[:3]] = torch.arange(3, dtype=torch.int32)
    ids, weights = random_routing(tokens, experts, 3)
    x = torch.randn(tokens, hidden).to(dtype)
    start = torch.randn(tokens, hidden)
    expected, size = expected_sums(packed_experts, slot_of_expert, x, ids, weights)
    out = run(device, tiling, packed, slot_of_expert, x, ids, weights, start, intermediate)
    bound = (EXACT_ERROR if tiling.exact else ROUNDED_ERROR) * size + 1e-6 * start.norm(dim=1)
    assert ((out - start.double() - expected).norm(dim=1) <= bound).all()


def run(
    device: torch.device,
    tiling: Tiling,
    packed: Tensor,
    slot_of_expert: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    start: Tensor,
    intermediate: int,
) -> Tensor:
    grouping = group_tokens(ids.to(device), weights.to(device), slot_of_expert.to(device), len(packed), tiling.tokens)
    out = start.to(device, copy=True)
    add_experts(out, x.to(device), packed.to(device), grouping, intermediate, tiling)
    return out.cpu()


# Small tiles: the interpreter is slow.
EXACT = replace(DECODE, groups=2)
ROUNDED = replace(PREFILL, rows=64, tokens=16)


@pytest.mark.parametrize(
    ("tiling", "sizes", "tokens", "dtype"),
    [
        (EXACT, (96, 64), 11, torch.bfloat16),
        (EXACT, (64, 96), 1, torch.float32),
        (ROUNDED, (64, 96), 19, torch.bfloat16),
    ],
)
def test_equals_float64_at_ragged_sizes(
    device: torch.device, tiling: Tiling, sizes: tuple[int, int], tokens: int, dtype: torch.dtype
) -> None:
    compare(device, tiling, sizes, tokens, experts=4, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", [DECODE, PREFILL], ids=["exact", "rounded"])
def test_a_row_has_the_same_bits_in_any_batch(card: torch.device, tiling: Tiling) -> None:
    """Not in the interpreter: its products are numpy's, which add in an order that depends on a column's place."""
    hidden, intermediate, tokens = 1024, 256, 150
    _, packed = random_l32(3, hidden, intermediate)
    slots = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    ids, weights = random_routing(tokens, 4, 3)
    x, start = torch.randn(tokens, hidden).bfloat16(), torch.zeros(tokens, hidden)
    whole = run(card, tiling, packed, slots, x, ids, weights, start, intermediate)
    rows, order = torch.randperm(tokens)[:40], torch.randperm(3)
    ids, weights = ids[rows][:, order], weights[rows][:, order]
    part = run(card, tiling, packed, slots, x[rows], ids, weights, start[rows], intermediate)
    assert torch.equal(part, whole[rows])


@pytest.mark.parametrize(("tokens", "tile"), [(1, 16), (23, 4), (64, 16)])
def test_grouping_gives_each_assignment_to_one_tile(tokens: int, tile: int) -> None:
    ids, weights = random_routing(tokens, 9, 4)
    slots = torch.tensor([3, -1, 0, -1, 1, 4, -1, 2, 5], dtype=torch.int32)
    grouping = group_tokens(ids, weights, slots, 6, tile)
    seen = []
    for slot, first, stop in zip(grouping.tile_slot, grouping.tile_first, grouping.tile_stop, strict=True):
        assert int(stop) - int(first) <= tile
        for assignment in grouping.order[int(first) : int(stop)].tolist():
            token, k = divmod(assignment, 4)
            expert = ids[token].sort().values[k]
            assert slots[expert] == slot == grouping.slots[token, k]
            assert grouping.weights[token, k] == weights[token][ids[token] == expert]
            seen.append(assignment)
    assert sorted(seen) == (grouping.slots.flatten() >= 0).nonzero().flatten().tolist()


def test_sizes_that_do_not_fit_are_refused(device: torch.device) -> None:
    ids, weights = random_routing(2, 3, 2)
    grouping = group_tokens(ids, weights, torch.arange(3, dtype=torch.int32), 3, DECODE.tokens)
    out, x = torch.zeros(2, 64), torch.randn(2, 64)
    with pytest.raises(ValueError, match="multiples of 32"):
        add_experts(out, x, torch.zeros(3, 5, dtype=torch.uint8), grouping, 40)
    with pytest.raises(ValueError, match="experts: expected contiguous uint8"):
        add_experts(out, x, torch.zeros(3, 5, dtype=torch.uint8), grouping, 64)
    _, packed = random_l32(3, 64, 32)
    with pytest.raises(ValueError, match="out: expected contiguous fp32"):
        add_experts(out.half(), x, packed, grouping, 32)
    with pytest.raises(ValueError, match="grouping: expected 2 tokens in tiles of 128"):
        add_experts(out, x, packed, grouping, 32, PREFILL)


@pytest.mark.gpu
@pytest.mark.parametrize(("tiling", "tokens"), [(DECODE, 1), (DECODE, 16), (PREFILL, 100)])
def test_equals_float64_at_full_width(card: torch.device, tiling: Tiling, tokens: int) -> None:
    compare(card, tiling, (7168, 2048), tokens=tokens, experts=4, dtype=torch.bfloat16)

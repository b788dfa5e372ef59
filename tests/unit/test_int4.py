"""The INT4 format: against the compressed-tensors package, the worked example, and its own inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid_k2.checkpoint import GROUP, PackedWeight, dequantize_int4, pack_int4, quantize_int4, unpack_int4
from tests.generators import dequantized

seeds = st.integers(0, 2**32 - 1)


def random_values(seed: int, *shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def random_matrix(seed: int, rows: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, words and log-normal scales of a matrix."""
    q = random_values(seed, rows, groups * GROUP)
    scale = torch.randn(rows, groups, generator=torch.Generator().manual_seed(seed + 1)).exp() / 50
    return q, pack_int4(q), scale.to(torch.bfloat16)


def test_worked_example() -> None:
    q = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.tolist() == [[-22444272]]
    assert packed.view(torch.uint8).tolist() == [[0x10, 0x87, 0xA9, 0xFE]]
    assert unpack_int4(packed, 8).tolist() == q.tolist()


@settings(max_examples=60)
@given(seed=seeds, rows=st.integers(1, 9), columns=st.integers(1, 131))
def test_packs_like_compressed_tensors(seed: int, rows: int, columns: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = random_values(seed, rows, columns)
    theirs = helpers.pack_to_int32(q, 4)
    ours = pack_int4(q)
    assert ours.dtype == torch.int32
    assert torch.equal(ours, theirs)
    assert torch.equal(unpack_int4(theirs, columns), q)
    assert torch.equal(helpers.unpack_from_int32(ours, 4, q.shape), q)


@settings(max_examples=30)
@given(seed=seeds, lead=st.lists(st.integers(0, 4), min_size=0, max_size=3), columns=st.integers(1, 70))
def test_unpack_undoes_pack(seed: int, lead: list[int], columns: int) -> None:
    q = random_values(seed, *lead, columns)
    packed = pack_int4(q)
    assert packed.shape == (*lead, -(-columns // 8))
    assert torch.equal(unpack_int4(packed, columns), q)


@settings(max_examples=30)
@given(seed=seeds, rows=st.integers(1, 7), words=st.integers(1, 20))
def test_pack_undoes_unpack(seed: int, rows: int, words: int) -> None:
    """Every word is some matrix, so that packing is lossless both ways."""
    source = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, (rows, words), generator=source).to(torch.int32)
    assert torch.equal(pack_int4(unpack_int4(packed, 8 * words)), packed)


def test_pack_of_a_view() -> None:
    q = random_values(5, 40, 6).t()
    assert torch.equal(pack_int4(q), pack_int4(q.contiguous()))
    assert torch.equal(unpack_int4(pack_int4(q), 40), q)
    packed = pack_int4(random_values(6, 3, 64))
    assert torch.equal(unpack_int4(packed[:, 1:3], 16), unpack_int4(packed, 64)[:, 8:24])


@settings(max_examples=30)
@given(seed=seeds, rows=st.integers(1, 6), groups=st.integers(1, 5))
def test_dequantize_is_exact(seed: int, rows: int, groups: int) -> None:
    q, packed, scale = random_matrix(seed, rows, groups)
    exact = q.double() * scale.double().repeat_interleave(GROUP, dim=1)
    weight = dequantize_int4(packed, scale)
    assert weight.dtype == torch.float32
    assert torch.equal(weight.double(), exact)  # 4 bits times 8 bits fit FP32's 24
    assert torch.equal(weight, dequantized(packed, scale))
    assert torch.equal(dequantize_int4(packed, scale, torch.bfloat16), exact.to(torch.bfloat16))


def test_each_scale_covers_its_32_columns() -> None:
    packed = pack_int4(torch.ones(2, 96, dtype=torch.int8))
    scale = torch.arange(1.0, 7.0).view(2, 3).to(torch.bfloat16)
    weight = dequantize_int4(packed, scale)
    assert weight[0].tolist() == [1.0] * 32 + [2.0] * 32 + [3.0] * 32
    assert weight[1].tolist() == [4.0] * 32 + [5.0] * 32 + [6.0] * 32


@settings(max_examples=30)
@given(seed=seeds, rows=st.integers(1, 6), groups=st.integers(1, 5), spread=st.floats(1e-4, 1e3))
def test_quantize_is_within_half_a_step(seed: int, rows: int, groups: int, spread: float) -> None:
    weight = torch.randn(rows, groups * GROUP, generator=torch.Generator().manual_seed(seed)) * spread
    packed, scale = quantize_int4(weight)
    step = scale.double().repeat_interleave(GROUP, dim=1)
    error = (dequantize_int4(packed, scale).double() - weight.double()).abs()
    assert scale.dtype == torch.bfloat16
    assert bool((error <= step * (0.5 + 2**-20)).all())  # the quotient is rounded to FP32 before it is rounded


@settings(max_examples=30)
@given(seed=seeds, rows=st.integers(1, 6), groups=st.integers(1, 5))
def test_quantize_keeps_what_is_quantized(seed: int, rows: int, groups: int) -> None:
    """A matrix whose largest value in every group is 7 steps of a bf16 scale comes back unchanged."""
    q, _, scale = random_matrix(seed, rows, groups)
    q = q.clamp(-7, 7)
    q[:, ::GROUP] = 7
    packed, new_scale = quantize_int4(dequantize_int4(pack_int4(q), scale))
    assert torch.equal(new_scale, scale)
    assert torch.equal(unpack_int4(packed, groups * GROUP), q)


def test_group_of_zeros() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 40] = -3.5
    packed, scale = quantize_int4(weight)
    assert scale.tolist() == [[0.0, 0.0], [0.0, 0.5]]
    assert torch.equal(dequantize_int4(packed, scale), weight)


def test_packed_weight() -> None:
    q, packed, scale = random_matrix(3, 5, 2)
    weight = PackedWeight(packed, scale)
    assert weight.shape == (5, 64)
    assert weight.nbytes == 5 * 32 + 5 * 2 * 2
    assert torch.equal(weight.dequantize(), q.float() * scale.float().repeat_interleave(GROUP, dim=1))


def test_wrong_arguments() -> None:
    q = torch.zeros(2, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"expected int8 values, got torch\.int32"):
        pack_int4(q.int())
    for value in (8, -9):
        with pytest.raises(ValueError, match=r"expected values in \[-8, 7\]"):
            pack_int4(q + value)
    packed = pack_int4(q)
    with pytest.raises(ValueError, match=r"expected int32 \[..., 7\] for 56 columns, got torch.int32 \[2, 8\]"):
        unpack_int4(packed, 56)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        unpack_int4(packed.long(), 64)
    with pytest.raises(ValueError, match=r"expected scales \[2, 2\] for words \[2, 8\], got \[2, 3\]"):
        dequantize_int4(packed, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"a multiple of 32\], got \[2, 40\]"):
        quantize_int4(torch.zeros(2, 40))

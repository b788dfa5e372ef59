"""Layout L32: the numpy definition, and the native packer against it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybrid_k2.checkpoint import pack_int4
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.l32 import fuse_gate_up, pack_l32, unpack_l32
from tests.unit.experts_common import load_random_experts, native_layer, random_expert


def random_matrix(rows: int, inputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values -8..7 [rows, inputs], their packed words and random scale bits."""
    q = torch.randint(-8, 8, (rows, inputs), dtype=torch.int8)
    scale = np.random.default_rng().integers(0, 2**16, (rows, inputs // 32), dtype=np.uint16)
    return q.numpy(), pack_int4(q).numpy(), scale


@pytest.mark.parametrize(("rows", "inputs"), [(32, 32), (96, 160), (224, 32), (32, 416)])
def test_unpack_inverts_pack_without_loss(rows: int, inputs: int) -> None:
    _, packed, scale = random_matrix(rows, inputs)
    blocks = pack_l32(packed, scale)
    assert blocks.shape == (rows // 32, inputs // 32, 576)
    assert blocks.nbytes == packed.nbytes + scale.nbytes
    words, scales = unpack_l32(blocks)
    np.testing.assert_array_equal(words, packed)
    np.testing.assert_array_equal(scales, scale)


def test_a_block_holds_each_value_where_the_layout_says() -> None:
    q, packed, scale = random_matrix(64, 96)
    blocks = pack_l32(packed, scale)
    rng = np.random.default_rng()
    for _ in range(500):
        row, column = int(rng.integers(64)), int(rng.integers(96))
        block = blocks[row // 32, column // 32]
        half, r = row % 32 // 16, row % 16
        i, j = column % 32 // 8, column % 8
        byte = int(block[64 + (2 * i + half) * 64 + 4 * r + j % 4])
        nibble = byte >> 4 if j >= 4 else byte & 15
        assert nibble - 8 == q[row, column]
        assert block[:64].view(np.uint16)[2 * r + half] == scale[row, column // 32]


def test_fuse_interleaves_sixteen_rows() -> None:
    gate = np.arange(64)[:, None] * np.ones((1, 3), int)
    fused = fuse_gate_up(gate, gate + 100)
    assert fused[:, 0].tolist() == [
        start + row for block in range(4) for start in (16 * block, 100 + 16 * block) for row in range(16)
    ]


@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 32), (160, 96), (416, 224), (256, 128), (64, 448)])
def test_the_native_packer_writes_l32_and_loses_nothing(hidden: int, intermediate: int) -> None:
    layer = native_layer(hidden, intermediate, 3, 2)
    experts = load_random_experts(layer)
    assert layer.nbytes == sum(w.nbytes for expert in experts for w in (expert.gate, expert.up, expert.down))
    for number in (2, 0, 1):
        gate, up, down = experts[number].gate, experts[number].up, experts[number].down
        w13, w2 = layer.read_l32(number)
        fused = [
            fuse_gate_up(g.numpy(), u.numpy())
            for g, u in ((gate.packed, up.packed), (gate.scale.view(torch.uint16), up.scale.view(torch.uint16)))
        ]
        np.testing.assert_array_equal(w13, pack_l32(*fused))
        np.testing.assert_array_equal(w2, pack_l32(down.packed.numpy(), down.scale.view(torch.uint16).numpy()))
        back = layer.read_expert(number)
        for name in ("gate", "up", "down"):
            before, after = getattr(experts[number], name), getattr(back, name)
            assert torch.equal(before.packed, after.packed)
            assert torch.equal(before.scale.view(torch.int16), after.scale.view(torch.int16))


def test_an_expert_can_be_loaded_again() -> None:
    layer = native_layer(64, 64, 1, 1)
    layer.load_expert(0, random_expert(64, 64))
    second = random_expert(64, 64)
    layer.load_expert(0, second)
    assert torch.equal(layer.read_expert(0).down.packed, second.down.packed)


def test_an_expert_that_was_not_loaded_cannot_be_read() -> None:
    layer = native_layer(64, 64, 2, 1)
    with pytest.raises(ValueError, match="expert: expected a loaded one, got 1"):
        layer.read_l32(1)


def test_the_checksum_is_of_the_weights_alone() -> None:
    first, second = (native_layer(160, 96, 3, 2) for _ in range(2))
    experts = load_random_experts(first)
    for number, expert in enumerate(experts):
        second.load_expert(2 - number, expert)
        first.verify(number)
    checksums = [first.checksum(number) for number in range(3)]
    assert len(set(checksums)) == 3
    assert [second.checksum(2 - number) for number in range(3)] == checksums


@pytest.mark.parametrize("name", ["gate", "up", "down"])
@pytest.mark.parametrize("part", ["packed", "scale"])
def test_any_flipped_bit_changes_the_checksum(name: str, part: str) -> None:
    layer = native_layer(160, 96, 1, 1)
    expert = random_expert(160, 96)
    layer.load_expert(0, expert)
    before = layer.checksum(0)
    raw = getattr(getattr(expert, name), part).view(torch.uint8).flatten()
    bits = 8 if part == "packed" else 6  # a scale's sign and exponent stay in range with its low bits
    for at in torch.randint(raw.numel() // 2, (20,)).mul_(2).tolist():
        flip = 1 << int(torch.randint(bits, ()))
        raw[at] ^= flip
        layer.load_expert(0, expert)
        assert layer.checksum(0) != before
        raw[at] ^= flip
    layer.load_expert(0, expert)
    assert layer.checksum(0) == before


def test_weights_that_change_in_memory_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = native_layer(64, 64, 2, 1)
    load_random_experts(layer)
    layer.verify(1)
    loaded = layer.checksum(1)
    monkeypatch.setattr(layer, "checksum", lambda expert: loaded ^ 1)
    with pytest.raises(
        EngineError, match=rf"expert 1: expected weights with checksum {loaded ^ 1:016x}.*{loaded:016x}"
    ):
        layer.verify(1)


def test_no_checksum_before_loading() -> None:
    layer = native_layer(64, 64, 2, 1)
    with pytest.raises(ValueError, match="expert: expected a loaded one, got 1"):
        layer.checksum(1)

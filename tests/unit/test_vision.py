"""The vision tower against its float64 reference, and what it is like: repeatable, bounded, one image at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_k2.checkpoint import Checkpoint, vision_tensors
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import CheckpointError, MemoryBudgetError
from hybrid_k2.host.cpu import cpu_flags
from hybrid_k2.model import vision, vision_loading
from hybrid_k2.model.vision import Affine, Block, LayerNorm, Projector, VisionModel
from hybrid_k2.model.vision_loading import load_vision_model
from hybrid_k2.placement import overheads as planned
from hybrid_k2.protocol import Image, ImageFormat
from hybrid_k2.vision_config import VisionConfig
from tests.generators import read_tensors, write_checkpoint, write_tensors
from tests.memory import PeakBytes
from tests.models import loaded_vision, make_test_plan
from tests.pictures import random_image
from tests.reference import vision as reference

# As in tests/oracle/test_vision.py: FP32 against a sum without rounding.
FP32_TOLERANCE = 3e-5
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "a grid that is no square": {"init_pos_emb_height": 5, "init_pos_emb_width": 11, "projector_ln_eps": 1e-2},
    "four heads": {
        "vt_num_attention_heads": 4,
        "vt_intermediate_size": 7,
        "vt_num_hidden_layers": 3,
    },
}
GRIDS = [(2, 2), (2, 30), (14, 10), (26, 4)]


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vision"), seed=8, num_hidden_layers=1, vision=request.param)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), seed=9, num_hidden_layers=1)


def expected_rows(folder: Path, image: Image) -> Tensor:
    config = ModelConfig.load(folder).vision
    assert config is not None
    return reference.features(image.patches(), *image.grid, read_tensors(folder), config)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fp32(folder: Path, grid: tuple[int, int]) -> None:
    image = random_image(*grid, seed=1)
    with loaded_vision(folder, "reference") as model:
        got = model.encode(image)
    expected = expected_rows(folder, image)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < FP32_TOLERANCE
    assert expected.std() > 0.3, "rows are too flat for the comparison to mean something"


@pytest.mark.parametrize("flags", [frozenset(), frozenset({"amx_bf16"})], ids=["without bf16", "with bf16"])
def test_bf16(folder: Path, flags: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are stored in bf16; where the CPU has no products of bf16, they are widened and nothing is lost."""
    monkeypatch.setattr(vision_loading, "cpu_flags", lambda: flags)
    image = random_image(14, 10, seed=2)
    with loaded_vision(folder, "host") as model:
        got = model.encode(image)
        depth = 3 + 6 * len(model.blocks)
        assert model.blocks[0].fc0.weight.dtype == torch.bfloat16
    expected = expected_rows(folder, image)
    error, size = (got - expected).square().mean().sqrt(), expected.std()
    if flags:
        # Each product rounds both what it reads and what it gives to 8 bits: by 2^-9 at most, and 2^-9/sqrt(3) on
        # average. So many in a row that may double what came before: the root of their number, twice.
        assert error < 2 * math.sqrt(2 * depth / 3) * 2**-9 * size
        assert error > 1e-4 * size
    else:
        assert (got - expected).abs().max() < FP32_TOLERANCE


def test_one_step_for_each_block(tiny: Path) -> None:
    image = random_image(6, 8, seed=3)
    with loaded_vision(tiny, "host") as model:
        encoding = model.begin(image)
        assert [encoding.step() for _ in range(4)] == [False, False, False, True]
        assert encoding.step(), "it stays ready"
        assert torch.equal(encoding.features, model.encode(image))
        assert encoding.features.shape == (12, model.text_hidden_size)
        assert encoding.features.device == model.device


def test_a_large_image_has_a_step_for_each_piece(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "PIECE", 20)
    with loaded_vision(tiny, "host") as model:
        encoding = model.begin(random_image(6, 8, seed=3))
        assert [encoding.step() for _ in range(8)] == [False] * 7 + [True]


def test_memory_that_runs_out_is_an_error_and_no_end(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = random_image(6, 8, seed=3)
    with loaded_vision(tiny, "host") as model:
        encoding, other = model.begin(image), model.begin(image)
        assert not encoding.step()
        with monkeypatch.context() as patch:
            patch.setattr(Block, "add_to", _without_memory)
            with pytest.raises(MemoryBudgetError, match=r"^image: expected room in host memory, got none left"):
                encoding.step()
        with pytest.raises(ValueError, match="got one that has failed"):
            encoding.step()
        while not other.step():
            pass
        assert torch.equal(other.features, model.encode(image))


def _without_memory(*_: object) -> None:
    raise MemoryError


def test_images_do_not_meet(tiny: Path) -> None:
    """Encoding twice gives the same bits, and so does encoding while another image is on its way."""
    first, second = random_image(6, 8, seed=4), random_image(10, 4, seed=5)
    with loaded_vision(tiny, "host") as model:
        alone = [model.encode(image) for image in (first, second)]
        encodings = [model.begin(image) for image in (first, second)]
        for _ in range(4):
            done = [encoding.step() for encoding in encodings]
        assert all(done)
        for encoding, rows in zip(encodings, alone, strict=True):
            assert torch.equal(encoding.features, rows)


def test_pieces_change_nothing_but_rounding(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = random_image(10, 14, seed=6)
    with loaded_vision(tiny, "reference") as model:
        whole = model.encode(image)
        monkeypatch.setattr(vision, "PIECE", 36)
        assert (model.encode(image) - whole).abs().max() < FP32_TOLERANCE


def test_positions_are_those_of_torch_and_of_the_reference() -> None:
    grid = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1))
    for size in ((7, 5), (2, 2), (14, 3), (30, 22)):
        got = vision.position_grid(grid, *size)
        assert (got - reference.positions(grid.double(), *size)).abs().max() < 1e-5
    assert torch.equal(vision.position_grid(grid, 7, 5), grid.flatten(0, 1)), "of the grid's own size: as it is"


def test_loading_reads_every_byte_of_the_plan(folder: Path) -> None:
    """The plan's bytes are those on disk, and those in memory."""
    config = ModelConfig.load(folder)
    counted: list[int] = []
    with Checkpoint.open(folder) as checkpoint:
        plan = make_test_plan(checkpoint, config, "host")
        on_disk = sum(checkpoint.info(spec.name).nbytes for spec in vision_tensors(config))
        model = load_vision_model(checkpoint, config, plan, counted.append)
    assert model is not None
    (row,) = (row for row in plan.rows if row.what == "vision")
    assert sum(counted) == on_disk == row.nbytes
    held = {id(tensor): tensor.nbytes for tensor in _tensors(model)}
    assert sum(held.values()) == row.nbytes
    model.close()


def _tensors(model: VisionModel) -> list[Tensor]:
    parts = [model.embed, model.final_norm, model.projector.norm, model.projector.inner, model.projector.outer]
    for block in model.blocks:
        parts += [block.norm0, block.wqkv, block.wo, block.norm1, block.fc0, block.fc1]
    return [model.positions, *(tensor for part in parts for tensor in (part.weight, part.bias))]


def test_a_text_model_has_none(tmp_path: Path) -> None:
    config = ModelConfig.load(write_checkpoint(tmp_path, model_type="kimi_k2", num_hidden_layers=1))
    with Checkpoint.open(tmp_path) as checkpoint:
        plan = make_test_plan(checkpoint, config, "host")
        assert load_vision_model(checkpoint, config, plan, lambda nbytes: None) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite(tiny: Path, tmp_path: Path, value: float) -> None:
    name = "vision_tower.encoder.blocks.1.mlp.fc0.weight"
    tensors = read_tensors(tiny)
    tensors[name][5, 7] = value
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    write_tensors(tmp_path, tensors)
    refused = pytest.raises(CheckpointError, match=rf"^{name}: expected finite numbers, got .* \(in model.safeten")
    with refused, loaded_vision(tmp_path, "host"):
        pass


def test_features_have_the_dtype_of_the_residual_stream(tiny: Path) -> None:
    image = random_image(4, 4, seed=7)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with loaded_vision(tiny, "host", activation_dtype=name) as model:
            assert model.encode(image).dtype == dtype


def _affine(outputs: int, inputs: int, dtype: torch.dtype) -> Affine:
    weight = torch.randn(outputs, inputs) / math.sqrt(inputs)
    return Affine(weight.bfloat16(), torch.zeros(outputs).bfloat16(), dtype)


def _wide_model(config: VisionConfig, dtype: torch.dtype) -> VisionModel:
    width, inner = config.hidden_size, config.intermediate_size
    norm = LayerNorm(torch.ones(width).bfloat16(), torch.zeros(width).bfloat16())
    qkv, out = _affine(3 * width, width, dtype), _affine(width, width, dtype)
    block = Block(norm, qkv, out, norm, _affine(inner, width, dtype), _affine(width, inner, dtype))
    merged = config.merged_size
    projector = Projector(norm, _affine(merged, merged, dtype), _affine(config.text_hidden_size, merged, dtype))
    embed, grid = (
        _affine(width, config.patch_values, dtype),
        torch.randn(config.grid_rows, config.grid_columns, width).bfloat16(),
    )
    return VisionModel(config, embed, grid, [block], norm, projector, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frames", "grid", "near"), [(None, (48, 48), 0.6), (4, (24, 24), 0.4)])
def test_memory_stays_within_the_bound_and_comes_near_it(
    frames: int | None, grid: tuple[int, int], near: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an eighth of the width and of the patches of K2.6; the scores of all pairs alone would be 42 MB."""
    config = VisionConfig(5, 144, 536, 1, 2, 8, 8, 896, 1e-5)
    monkeypatch.setattr(vision, "PIECE", 256)
    monkeypatch.setattr(planned, "IMAGE_PIECE", 256)
    monkeypatch.setattr(planned, "CLIP_PATCHES", 2304)
    monkeypatch.setattr(planned, "IMAGE_PATCHES", 2304)
    image = random_image(*grid, seed=1, patch=5, frames=frames)
    model = _wide_model(config, dtype)
    with PeakBytes() as peak:
        rows = model.encode(image)
    bound = planned.encoding_bytes(config, "bf16", on_host=True)
    assert rows.shape == (grid[0] * grid[1] // 4, 896)
    assert near * bound < peak.peak < bound


def test_the_largest_image_is_the_one_that_is_planned_for() -> None:
    assert 4 * ImageFormat().max_tokens == planned.IMAGE_PATCHES
    assert 4 * 4 * ImageFormat().max_frame_tokens == planned.CLIP_PATCHES
    assert vision.PIECE == planned.IMAGE_PIECE


def test_flags_of_this_cpu(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    assert cpu_flags(tmp_path) == frozenset()
    (tmp_path / "proc" / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu sse2 amx_bf16\n\nflags : other\n")
    assert cpu_flags(tmp_path) == {"fpu", "sse2", "amx_bf16"}

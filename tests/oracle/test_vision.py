"""Rows of images against transformers' own vision tower and projector with the same weights, in FP32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_k2.model.vision import VisionModel
from hybrid_k2.protocol import Image
from tests.generators import load_transformers_twin, write_checkpoint, write_transformers_twin
from tests.models import loaded_vision
from tests.pictures import random_image

pytest.importorskip("transformers", reason="transformers is the oracle: pip install 'hybrid-k2[test]'")

# Both round in FP32. Sums of n products err by about sqrt(n) * 2^-24 of their size, here n is at most 588: 1.5e-6 for
# each of some 20 products in a row, whose errors add up like random ones: 7e-6 of rows that are of size 1.
TOLERANCE = 3e-5

CASES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "one-head": {"vt_num_attention_heads": 1, "vt_num_hidden_layers": 1, "vt_intermediate_size": 33},
    "three-heads-of-20": {"vt_hidden_size": 60, "mm_hidden_size": 60, "vt_num_attention_heads": 3},
    "heads-of-72": {
        "vt_hidden_size": 144,
        "mm_hidden_size": 144,
        "vt_num_hidden_layers": 3,
        "init_pos_emb_height": 16,
        "init_pos_emb_width": 16,
    },
}
GRIDS = [(2, 2), (2, 24), (22, 4), (8, 8), (6, 10), (36, 28)]  # one token; narrow; of the learned grid; beyond it


@dataclass(frozen=True)
class Pair:
    """Hold one vision tower in both implementations."""

    ours: VisionModel
    theirs: Any

    def expected(self, image: Image) -> Tensor:
        with torch.inference_mode():
            grid = torch.tensor([[image.frames, *image.grid]])
            tower = self.theirs.model.vision_tower(image.patches(), grid_thw=grid)
            rows: Tensor = self.theirs.model.mm_projector(tower.pooler_output)[:, 0]
        return rows


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp("vision")
    write_checkpoint(folder / "original", seed=5, num_hidden_layers=1, vision=request.param)
    theirs, report = load_transformers_twin(write_transformers_twin(folder / "original", folder / "twin"))
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with loaded_vision(folder / "original", "reference") as ours:
        yield Pair(ours, theirs)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_of_an_image(pair: Pair, grid: tuple[int, int]) -> None:
    image = random_image(*grid, seed=grid[0] * 100 + grid[1])
    got, expected = pair.ours.encode(image), pair.expected(image)
    assert got.shape == expected.shape == (grid[0] * grid[1] // 4, 64)
    assert got.dtype == torch.float32
    error = (got - expected).abs().max().item()
    print(f"max error {error:.2e}, size {expected.std().item():.2f}")
    assert error < TOLERANCE
    assert expected.std() > 0.3, "rows are too flat for the comparison to mean something"


@pytest.mark.parametrize("frames", [2, 3, 4])
@pytest.mark.parametrize("grid", [(2, 2), (6, 10), (22, 4)], ids=str)
def test_rows_of_a_clip(pair: Pair, grid: tuple[int, int], frames: int) -> None:
    clip = random_image(*grid, seed=grid[0] * 100 + frames, frames=frames)
    got, expected = pair.ours.encode(clip), pair.expected(clip)
    assert got.shape == expected.shape == (grid[0] * grid[1] // 4, 64)
    assert (got - expected).abs().max() < TOLERANCE
    # Told apart: the same frames in another order, and one of them alone.
    for other in (clip.pixels[::-1], clip.pixels[0]):
        assert (pair.ours.encode(Image(other, clip.format)) - expected).abs().max() > 100 * TOLERANCE


def test_other_orders_are_far_from_it(pair: Pair) -> None:
    """The tolerance tells an image from its mirror image, so that rows and columns cannot be mixed up."""
    image = random_image(6, 10, seed=1)
    patches = image.pixels.reshape(6, 14, 10, 14, 3).transpose(2, 1, 0, 3, 4)
    turned = Image(np.ascontiguousarray(patches).reshape(140, 84, 3), image.format)
    rows = pair.expected(image).view(3, 5, -1).transpose(0, 1).flatten(0, 1)
    assert (pair.ours.encode(turned) - rows).abs().max() > 1000 * TOLERANCE

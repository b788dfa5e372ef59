"""An engine's loading with a vision tower: one count of bytes, images as the tower takes them, closed with the rest."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hybrid_k2.checkpoint import Checkpoint, expected_tensors
from hybrid_k2.config import ModelConfig
from hybrid_k2.engine import Engine
from hybrid_k2.engine.loading import load_model
from hybrid_k2.errors import CheckpointError, ConfigError
from hybrid_k2.protocol import ImageFormat
from tests.generators import read_tensors, write_checkpoint, write_tensors
from tests.pictures import random_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", num_hidden_layers=2)


def preprocessor(folder: Path, **changes: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"media_proc_cfg": changes}))


def test_the_bytes_of_both_parts_are_one_count(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    loaded = load_model(folder, "host", None, lambda done, total: calls.append((done, total)))
    loaded.close()
    config = ModelConfig.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        needed = sum(checkpoint.info(spec.name).nbytes for spec in expected_tensors(config, checkpoint.has))
    assert {total for _, total in calls} == {needed}
    assert all(before < after for (before, _), (after, _) in pairwise(calls))
    assert calls[-1][0] == needed


def test_an_engine_has_and_closes_it(folder: Path) -> None:
    preprocessor(folder, in_patch_limit=256)
    with Engine.load(folder, rules="host") as engine:
        vision = engine.loaded.vision
        assert vision is not None
        assert engine.loaded.images == ImageFormat(patch_limit=256)
        assert vision.encode(random_image(2, 4, seed=1)).shape == (2, engine.config.hidden_size)
    assert not vision.blocks
    with pytest.raises(AttributeError):
        vision.encode(random_image(2, 4, seed=1))


def test_a_text_model_has_neither(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model_type="kimi_k2", num_hidden_layers=2)
    preprocessor(folder, patch_size=3)  # not read
    loaded = load_model(folder, "host", None, None)
    assert (loaded.vision, loaded.images) == (None, None)
    loaded.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 16}, "patch_size and merge_kernel_size: expected 14 and 2 as in config.json, got 16 and 2"),
        (
            {"merge_kernel_size": 1},
            "patch_size and merge_kernel_size: expected 14 and 2 as in config.json, got 14 and 1",
        ),
        ({"in_patch_limit": 20000}, "expected limits that give an image at most 4482 tokens, got "),
        ({"in_patch_limit_each_frame": 5000}, "expected limits that give a frame at most 1374 tokens, got "),
        ({"in_patch_limit": "all"}, "media_proc_cfg: in_patch_limit: expected an integer"),
    ],
)
def test_images_that_the_tower_does_not_take(folder: Path, changes: dict[str, Any], message: str) -> None:
    preprocessor(folder, **changes)
    with pytest.raises(ConfigError) as caught:
        load_model(folder, "host", None, None)
    assert caught.value.message.startswith(f"{folder / 'preprocessor_config.json'}: {message}")


def test_a_tower_with_other_patches_and_no_file_that_says_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, vision={"patch_size": 16})
    with pytest.raises(ConfigError, match="expected 16 and 2 as in") as caught:
        load_model(folder, "host", None, None)
    assert caught.value.hint == "there is no such file, and K2.6's values stand for it"


def test_a_tower_that_cannot_be_loaded_ends_the_loading(folder: Path) -> None:
    name = "mm_projector.proj.0.bias"
    tensors = read_tensors(folder)
    tensors[name][3] = float("nan")
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=f"^{name}: expected finite numbers"):
        Engine.load(folder, rules="host")

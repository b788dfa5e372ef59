"""VisionConfig: both spellings, the real file, and one clear refusal for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import ConfigError, UnsupportedModelError
from hybrid_k2.vision_config import VisionConfig
from tests.generators import config_dict, transformers_config

Data = dict[str, Any]
TINY = VisionConfig(
    patch_size=14,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=2,
    grid_rows=8,
    grid_columns=8,
    text_hidden_size=64,
    projector_norm_eps=1e-5,
)


def vision_of(data: Data) -> VisionConfig | None:
    return ModelConfig.from_dict(data, "config.json").vision


def changed(**changes: object) -> Data:
    """Change fields of the original spelling; None removes one."""
    return _with(config_dict(), changes)


def changed_native(**changes: object) -> Data:
    """Change fields of transformers' own spelling."""
    return _with(transformers_config(config_dict()), changes)


def _with(data: Data, changes: Data) -> Data:
    vision = data["vision_config"] | changes
    return data | {"vision_config": {name: value for name, value in vision.items() if value is not None}}


def test_the_real_file(kimi_data: Path) -> None:
    vision = ModelConfig.load(kimi_data).vision
    assert vision == VisionConfig(14, 1152, 4304, 27, 16, 64, 64, 7168, 1e-5)
    assert (vision.head_dim, vision.patch_values, vision.merged_size) == (72, 588, 4608)


def test_both_spellings() -> None:
    assert vision_of(config_dict()) == TINY
    assert vision_of(transformers_config(config_dict())) == TINY


def test_a_model_without_vision() -> None:
    for nothing in ({}, None):
        assert vision_of(config_dict() | {"vision_config": nothing}) is None
    data = config_dict()
    del data["vision_config"]
    assert vision_of(data) is None
    assert vision_of(config_dict(model_type="kimi_k2") | {"vision_config": {"vt_hidden_size": "?"}}) is None


def test_the_norm_of_the_projector() -> None:
    assert vision_of(changed(projector_ln_eps=3e-4)).projector_norm_eps == 3e-4  # type: ignore[union-attr]
    assert vision_of(changed(projector_ln_eps=None)).projector_norm_eps == 1e-5  # type: ignore[union-attr]
    native = transformers_config(config_dict()) | {"projection_layer_norm_eps": 3e-4}
    assert vision_of(native).projector_norm_eps == 3e-4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pos_emb_type", "learned"),
        ("merge_kernel_size", [1, 2]),
        ("merge_kernel_size", 2),
        ("merge_type", "mean"),
        ("video_attn_type", "spatial"),
        ("mm_projector_type", "mlp"),
        ("projector_hidden_act", "silu"),
    ],
)
def test_other_mathematics(field: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"config.json: vision_config: {field}: expected .* \(not implem"):
        vision_of(changed(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("rope_parameters", {"rope_type": "axial", "rope_theta": 50000.0}),
    ],
)
def test_other_mathematics_in_the_other_spelling(field: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"vision_config: {field}.*: expected "):
        vision_of(changed_native(**{field: value}))
    vision_of(changed_native(rope_parameters={"rope_type": "axial", "rope_theta": 10000}))


@pytest.mark.parametrize(
    "field",
    [
        *("patch_size", "vt_hidden_size", "vt_intermediate_size", "vt_num_hidden_layers", "vt_num_attention_heads"),
        *("init_pos_emb_height", "init_pos_emb_width"),
    ],
)
@pytest.mark.parametrize("value", [None, 0, "48", 1.5])
def test_a_size_that_is_none(field: str, value: object) -> None:
    with pytest.raises(
        ConfigError, match=f"config.json: vision_config: {field}: expected an integer of at least 1, got"
    ):
        vision_of(changed(**{field: value}))


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(
        ConfigError, match=r"vision_config: hidden size: expected a multiple of 5 \(the heads\), got 48"
    ):
        vision_of(changed(vt_num_attention_heads=5))
    with pytest.raises(ConfigError, match=r"columns of a head: expected a multiple of 4 .*, got 6"):
        vision_of(changed(vt_num_attention_heads=8))
    with pytest.raises(ConfigError, match=r"vision_config: mm_hidden_size: expected 48, got 64"):
        vision_of(changed(mm_hidden_size=64))
    with pytest.raises(ConfigError, match=r"vision_config: text_hidden_size: expected 64, got 7168"):
        vision_of(changed(text_hidden_size=7168))
    with pytest.raises(ConfigError, match=r"config.json: projection_hidden_size: expected 48, got 1152"):
        vision_of(transformers_config(config_dict()) | {"projection_hidden_size": 1152})


def test_no_object() -> None:
    with pytest.raises(ConfigError, match=r"config.json: vision_config: expected an object, got \[1\]"):
        vision_of(config_dict() | {"vision_config": [1]})

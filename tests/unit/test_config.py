"""ModelConfig: the real file, odd sizes, and one clear refusal for everything else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid_k2.config import ModelConfig, RopeScaling
from hybrid_k2.errors import ConfigError, UnsupportedModelError, shown
from tests.conftest import SHARED
from tests.generators import config_dict

Data = dict[str, Any]
REQUIRED = [
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "q_lora_rank"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
    *("first_k_dense_replace", "routed_scaling_factor", "rms_norm_eps", "norm_topk_prob", "rope_theta"),
    *("n_group", "topk_group"),
]


def write(folder: Path, data: object, name: str = "config.json") -> Path:
    (folder / name).write_text(json.dumps(data))
    return folder


def text_of(data: Data) -> Data:
    text: Data = data.get("text_config", data)
    return text


# The published values.


def test_real_config(kimi_data: Path) -> None:
    config = ModelConfig.load(kimi_data)
    assert config.model_type == "kimi_k25"
    assert config.tensor_prefix == "language_model."
    assert config.vision is not None
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (163840, 7168, 18432)
    assert (config.moe_intermediate_size, config.num_hidden_layers, config.num_attention_heads) == (2048, 61, 64)
    assert (config.n_shared_experts, config.n_routed_experts, config.num_experts_per_tok) == (1, 384, 8)
    assert (config.q_lora_rank, config.kv_lora_rank) == (1536, 512)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (128, 64, 128)
    assert (config.qk_head_dim, config.latent_dim) == (192, 576)
    assert config.moe_layers == range(1, 61)
    assert config.dense_layers == range(1)
    assert config.rope_scaling == RopeScaling(64.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert config.rope_scaling.rotary_scale == 1.0
    assert (config.rope_theta, config.rms_norm_eps, config.latent_norm_eps) == (50000.0, 1e-5, 1e-6)
    assert (config.routed_scaling_factor, config.norm_topk_prob) == (2.827, True)
    assert config.max_position_embeddings == 262144
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_ids) == (163584, 163839, (163586,))
    assert config.softmax_scale == pytest.approx(0.144679626, rel=1e-8)


def test_demo_prototype_config() -> None:
    folder = SHARED / "prototypes" / "demo-model" / "checkpoint"
    if not folder.is_dir():
        pytest.skip(f"the prototype of the demo model is not at {folder}")
    config = ModelConfig.load(folder)
    assert (config.hidden_size, config.num_hidden_layers, config.n_routed_experts) == (256, 4, 32)


# Shapes that are accepted.


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_v3"])
def test_text_only(model_type: str) -> None:
    config = ModelConfig.from_dict(config_dict(model_type=model_type), "config.json")
    assert (config.model_type, config.tensor_prefix, config.vision) == (model_type, "", None)


def test_odd_sizes() -> None:
    data = config_dict(
        num_hidden_layers=7,
        n_routed_experts=24,
        num_experts_per_tok=6,
        hidden_size=160,
        moe_intermediate_size=96,
        num_attention_heads=3,
        first_k_dense_replace=2,
    )
    config = ModelConfig.from_dict(data, "config.json")
    assert config.moe_layers == range(2, 7)
    assert list(config.dense_layers) == [0, 1]
    assert (config.hidden_size, config.num_attention_heads, config.num_experts_per_tok) == (160, 3, 6)


@pytest.mark.parametrize("first", [0, 3])
def test_all_dense_or_none(first: int) -> None:
    config = ModelConfig.from_dict(config_dict(first_k_dense_replace=first), "config.json")
    assert len(config.dense_layers) == first
    assert len(config.moe_layers) == 3 - first


def test_plain_rope() -> None:
    config = ModelConfig.from_dict(config_dict(rope_scaling=None), "config.json")
    assert config.rope_scaling is None
    assert config.softmax_scale == pytest.approx(24**-0.5)


def test_rope_parameters_of_newer_saves() -> None:
    data = config_dict()
    yarn = text_of(data).pop("rope_scaling")
    theta = text_of(data).pop("rope_theta")
    text_of(data)["rope_parameters"] = {**yarn, "rope_type": yarn["type"], "rope_theta": theta}
    assert ModelConfig.from_dict(data, "config.json") == ModelConfig.from_dict(config_dict(), "config.json")
    text_of(data)["rope_parameters"] = {"rope_type": "default", "rope_theta": 12345.0}
    plain = ModelConfig.from_dict(data, "config.json")
    assert (plain.rope_scaling, plain.rope_theta) == (None, 12345.0)


def test_scaled_softmax_follows_mscale_all_dim() -> None:
    scaling = {**text_of(config_dict())["rope_scaling"], "mscale": 0.5, "mscale_all_dim": 2.0, "factor": 8.0}
    config = ModelConfig.from_dict(config_dict(rope_scaling=scaling), "config.json")
    assert config.softmax_scale == pytest.approx(24**-0.5 * (0.2 * math.log(8) + 1) ** 2)
    assert config.rope_scaling is not None
    assert config.rope_scaling.rotary_scale == pytest.approx((0.05 * math.log(8) + 1) / (0.2 * math.log(8) + 1))


def test_draft_layers_are_counted_and_training_fields_ignored() -> None:
    data = config_dict()
    plain = ModelConfig.from_dict(data, "config.json")
    text_of(data).update(num_nextn_predict_layers=2, aux_loss_alpha="anything", temperature=7, use_cache=None)
    assert ModelConfig.from_dict(data, "config.json") == replace(plain, num_draft_layers=2)


def test_absent_fields_that_have_one_value() -> None:
    data = config_dict()
    for name in ("hidden_act", "scoring_func", "topk_method", "moe_layer_freq", "attention_bias"):
        del text_of(data)[name]
    for name in ("num_key_value_heads", "tie_word_embeddings", "num_nextn_predict_layers"):
        del text_of(data)[name]
    del data["tie_word_embeddings"]
    assert ModelConfig.from_dict(data, "config.json") == ModelConfig.from_dict(config_dict(), "config.json")


def test_plain_weights_need_no_int4_groups() -> None:
    config = ModelConfig.from_dict(config_dict(packed=False, hidden_size=90, moe_intermediate_size=50), "config.json")
    assert (config.hidden_size, config.moe_intermediate_size) == (90, 50)


def test_quantization_config_at_the_top_level() -> None:
    data = config_dict()
    quantization = text_of(data).pop("quantization_config")
    quantization["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    data["quantization_config"] = quantization
    with pytest.raises(UnsupportedModelError, match="num_bits: expected 4, got 8"):
        ModelConfig.from_dict(data, "config.json")


# End tokens.


def test_end_tokens_are_united(tmp_path: Path) -> None:
    data = config_dict()
    data["eos_token_id"] = [9, 7]
    text_of(data)["eos_token_id"] = 8
    write(tmp_path, data)
    assert ModelConfig.load(tmp_path).eos_token_ids == (9, 7, 8)
    write(tmp_path, {"eos_token_id": [7, 6]}, "generation_config.json")
    assert ModelConfig.load(tmp_path).eos_token_ids == (9, 7, 8, 6)


@pytest.mark.parametrize("value", [None, []])
def test_no_end_token(tmp_path: Path, value: object) -> None:
    data = config_dict(model_type="kimi_k2")
    data["eos_token_id"] = value
    assert ModelConfig.from_dict(data, "config.json").eos_token_ids == ()
    write(tmp_path, data)
    for generation in (None, {"eos_token_id": value}, {}):
        if generation is not None:
            write(tmp_path, generation, "generation_config.json")
        with pytest.raises(ConfigError, match=r"config\.json: eos_token_id: expected an end token .*, got none"):
            ModelConfig.load(tmp_path)
    write(tmp_path, {"eos_token_id": 5}, "generation_config.json")
    assert ModelConfig.load(tmp_path).eos_token_ids == (5,)


@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [-1, 512, 10**6000], ids=shown)
def test_token_ids_outside_the_vocabulary(name: str, value: int) -> None:
    inside = config_dict()
    text_of(inside)[name] = value
    for data in (config_dict() | {name: value}, inside):
        with pytest.raises(ConfigError, match=rf"{name}: expected token ids from 0 to 511 \(vocab_size\), got "):
            ModelConfig.from_dict(data, "config.json")
    ModelConfig.from_dict(config_dict() | {name: 511}, "config.json")


@pytest.mark.parametrize("value", [-1, [3, 512]])
def test_end_tokens_of_the_generation_config_outside_the_vocabulary(tmp_path: Path, value: object) -> None:
    write(tmp_path, config_dict())
    write(tmp_path, {"eos_token_id": value}, "generation_config.json")
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id: expected token ids from 0 to 511"):
        ModelConfig.load(tmp_path)


# Values of any size.


NESTED: list[Any] = []
for _ in range(5000):
    NESTED = [NESTED]


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**6000, NESTED], ids=["large", "low", "digits", "nested"])
@pytest.mark.parametrize("field", [*REQUIRED, "scoring_func", "rope_scaling", "num_key_value_heads"])
def test_a_field_of_any_size_is_refused_in_one_short_message(field: str, value: object) -> None:
    data = config_dict(model_type="kimi_k2", rope_scaling=None) | {field: value}
    with pytest.raises((ConfigError, UnsupportedModelError), match=f"config.json: {field}: expected ") as caught:
        ModelConfig.from_dict(data, "config.json")
    assert len(caught.value.message) < 400


def test_an_integer_that_no_float_holds_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, config_dict(rope_theta=10**400))
    with pytest.raises(ConfigError, match=r"rope_theta: expected a finite number above 1, got 10000"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("value", ["end", True, 1.5, [1, "end"]])
def test_end_token_of_another_type(value: object) -> None:
    with pytest.raises(ConfigError, match=r"eos_token_id: expected a token id"):
        ModelConfig.from_dict(config_dict() | {"eos_token_id": value}, "config.json")


# What is refused.


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "deepseek_v2", "kimi_linear"])
def test_another_model(tmp_path: Path, model_type: str) -> None:
    write(tmp_path, {"model_type": model_type, "hidden_size": 64})
    with pytest.raises(UnsupportedModelError, match=f"got '{model_type}'") as error:
        ModelConfig.load(tmp_path)
    assert str(tmp_path / "config.json") in error.value.message
    assert error.value.hint


def test_another_model_inside(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r'text_config: model_type: .*got "llama"'):
        ModelConfig.from_dict(config_dict() | {"text_config": {"model_type": "llama"}}, "config.json")


REFUSED = [
    ("scoring_func", "softmax"),
    ("topk_method", "group_limited_greedy"),
    ("n_group", 8),
    ("topk_group", 4),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("rope_interleave", False),
    ("tie_word_embeddings", True),
    ("moe_layer_freq", 2),
    ("q_lora_rank", None),
    ("num_key_value_heads", 2),
    ("hidden_size", 80),
    ("moe_intermediate_size", 48),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[field for field, _ in REFUSED])
def test_other_mathematics(field: str, value: object) -> None:
    data = config_dict()
    text_of(data)[field] = value
    with pytest.raises(UnsupportedModelError) as error:
        ModelConfig.from_dict(data, "config.json")
    assert f"config.json: text_config: {field}: expected " in error.value.message
    assert f"got {json.dumps(value)}" in error.value.message
    assert "(not implemented: " in error.value.message


def test_tied_embeddings_at_the_top_level() -> None:
    with pytest.raises(UnsupportedModelError, match="tie_word_embeddings"):
        ModelConfig.from_dict(config_dict() | {"tie_word_embeddings": True}, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(type="linear"), 'type: expected yarn, got "linear"'),
        (lambda s: s.update(rope_type="llama3"), 'rope_type: expected yarn, got "llama3"'),
        (lambda s: s.update(attention_factor=1.5), "attention_factor: expected null, got 1.5"),
        (lambda s: s.update(truncate=False), "truncate: expected true, got false"),
    ],
)
def test_other_rope_scaling(change: Callable[[Data], None], message: str) -> None:
    scaling = dict(text_of(config_dict())["rope_scaling"])
    change(scaling)
    with pytest.raises(UnsupportedModelError, match=f"rope_scaling: {message}"):
        ModelConfig.from_dict(config_dict(rope_scaling=scaling), "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("beta_fast"), "beta_fast: expected .* got no such field"),
        (lambda s: s.update(factor=0.5), "factor: expected at least 1, got 0.5"),
        (lambda s: s.update(factor="64"), "factor: expected a finite number above 0, got '64'"),
        (lambda s: s.update(factor=math.nan), "factor: expected a finite number above 0, got nan"),
        (lambda s: s.update(beta_fast=0.5), "beta_fast: expected at least beta_slow = 1.0, got 0.5"),
        (lambda s: s.update(original_max_position_embeddings=4096.0), "original_max.*: expected an integer"),
        (lambda s: s.pop("type"), "type: expected a string, got no such field"),
    ],
)
def test_damaged_rope_scaling(change: Callable[[Data], object], message: str) -> None:
    scaling = dict(text_of(config_dict())["rope_scaling"])
    change(scaling)
    with pytest.raises(ConfigError, match=f"rope_scaling: {message}"):
        ModelConfig.from_dict(config_dict(rope_scaling=scaling), "config.json")


OTHER_WEIGHTS = {
    "num_bits": 8,
    "type": "float",
    "symmetric": False,
    "strategy": "channel",
    "group_size": 128,
    "dynamic": True,
    "actorder": "group",
}


@pytest.mark.parametrize(("field", "value"), OTHER_WEIGHTS.items())
def test_other_weight_quantization(field: str, value: object) -> None:
    data = config_dict()
    text_of(data)["quantization_config"]["config_groups"]["group_0"]["weights"][field] = value
    with pytest.raises(UnsupportedModelError, match=rf"config_groups\.group_0\.weights: {field}: expected"):
        ModelConfig.from_dict(data, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("quant_method", "fp8"), ("format", "nvfp4-pack-quantized"), ("kv_cache_scheme", {"num_bits": 8})],
)
def test_other_quantization(field: str, value: object) -> None:
    data = config_dict()
    text_of(data)["quantization_config"][field] = value
    with pytest.raises(UnsupportedModelError, match=f"quantization_config: {field}: expected"):
        ModelConfig.from_dict(data, "config.json")


def test_quantized_activations() -> None:
    data = config_dict()
    text_of(data)["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(UnsupportedModelError, match=r"group_0: input_activations: expected null"):
        ModelConfig.from_dict(data, "config.json")


# What is wrong.


@pytest.mark.parametrize("field", REQUIRED)
def test_required_field(field: str) -> None:
    data = config_dict(model_type="kimi_k2", rope_scaling=None)
    del data[field]
    with pytest.raises(ConfigError, match=f"^config.json: {field}: expected .*, got no such field"):
        ModelConfig.from_dict(data, "config.json")
    data[field] = "many"
    with pytest.raises(ConfigError, match=f"^config.json: {field}: expected .*, got 'many'"):
        ModelConfig.from_dict(data, "config.json")


@pytest.mark.parametrize("value", [0, -1, True, 64.0, None, [64]])
def test_size_of_another_type(value: object) -> None:
    with pytest.raises(ConfigError, match=r"hidden_size: expected an integer of at least 1, got"):
        ModelConfig.from_dict(config_dict(hidden_size=value), "config.json")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_experts_per_tok": 17}, "num_experts_per_tok: expected at most n_routed_experts = 16, got 17"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers: expected at most 10000, got 100000000"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace: expected at most num_hidden_layers = 3, got 4"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: expected an even number, got 7"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: expected a finite number above 0, got 0"),
        ({"rope_theta": 1.0}, "rope_theta: expected a finite number above 1, got 1"),
    ],
)
def test_contradictions(overrides: Data, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(config_dict(**overrides), "config.json")


def test_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a checkpoint with config.json, got an empty folder") as error:
        ModelConfig.load(tmp_path)
    assert error.value.hint
    write(tmp_path, {}, "other.json")
    with pytest.raises(ConfigError, match=r"got a folder without config.json") as error:
        ModelConfig.load(tmp_path)
    assert error.value.hint
    with pytest.raises(ConfigError, match="got a path that does not exist"):
        ModelConfig.load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="got a file"):
        ModelConfig.load(tmp_path / "other.json")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"{'model_type': 1}"])
def test_bad_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"config.json: expected valid JSON, got"):
        ModelConfig.load(tmp_path)


def test_a_key_twice(tmp_path: Path) -> None:
    text = json.dumps(config_dict(), indent=1).replace('"hidden_size": 64', '"hidden_size": 64, "hidden_size": 128')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: expected valid JSON, got: key 'hidden_size' twice"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("data", [[], "kimi_k25", 3, None])
def test_json_that_is_no_object(tmp_path: Path, data: object) -> None:
    with pytest.raises(ConfigError, match="expected a JSON object"):
        ModelConfig.load(write(tmp_path, data))


def test_missing_model_type_and_text_config() -> None:
    with pytest.raises(ConfigError, match="model_type: expected a string, got no such field"):
        ModelConfig.from_dict({"hidden_size": 64}, "config.json")
    with pytest.raises(ConfigError, match="text_config: expected an object, got no such field"):
        ModelConfig.from_dict({"model_type": "kimi_k25"}, "config.json")


def test_bad_generation_config(tmp_path: Path) -> None:
    write(tmp_path, config_dict())
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config.json: expected valid JSON"):
        ModelConfig.load(tmp_path)
    write(tmp_path, {"eos_token_id": "end"}, "generation_config.json")
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id"):
        ModelConfig.load(tmp_path)

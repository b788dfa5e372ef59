"""The model's configuration: what `config.json` says, checked field by field.

A Kimi K2.5/K2.6 checkpoint (`model_type` kimi_k25) nests the language model in `text_config` and prefixes its tensors
with `language_model.`; a text-only K2 (kimi_k2, deepseek_v3) is that inner object alone. Everything that changes the
mathematics is read from the file or compared with the one value that is implemented; keys that only serve training
or another library's generation defaults are ignored.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from hybrid_k2.errors import ConfigError, UnsupportedModelError, shown
from hybrid_k2.fields import Fields
from hybrid_k2.files import parse_json_object, read_file
from hybrid_k2.vision_config import VisionConfig

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
MULTIMODAL_MODEL_TYPE = "kimi_k25"
TEXT_MODEL_TYPES = ("kimi_k2", "deepseek_v3")
MAX_LAYERS = 10_000  # a plan goes through them one by one
INT4_GROUP = 32  # input columns that share one scale in the INT4 format of K2.5/K2.6

# Field, the one value that is implemented, and why any other is refused. An absent field means that value.
_FIXED_FIELDS: tuple[tuple[str, object, str], ...] = (
    ("hidden_act", "silu", "the MLPs and experts are SwiGLU"),
    ("scoring_func", "sigmoid", "the router scores experts with a sigmoid"),
    ("topk_method", "noaux_tc", "the router chooses experts by score plus a correction bias"),
    ("moe_layer_freq", 1, "every layer after the first dense ones is a mixture of experts"),
    ("rope_interleave", True, "rotary pairs are neighbouring columns"),
    ("attention_bias", False, "the attention projections carry no bias"),
    ("tie_word_embeddings", False, "lm_head is a tensor of its own"),
)
_INT4_WEIGHTS: tuple[tuple[str, object], ...] = (
    ("num_bits", 4),
    ("type", "int"),
    ("symmetric", True),
    ("strategy", "group"),
    ("group_size", INT4_GROUP),
    ("dynamic", False),
    ("actorder", None),
)


@dataclass(frozen=True)
class RopeScaling:
    """Hold the YaRN parameters (`rope_scaling`); used by model/rope.py and for `ModelConfig.softmax_scale`."""

    factor: float  # context extension factor; low frequencies are divided by it
    original_max_position_embeddings: int  # context length before the extension
    beta_fast: float  # rotations over the original context above which a frequency is left alone
    beta_slow: float  # rotations below which a frequency is divided by `factor`
    mscale: float  # numerator of the cos/sin multiplier
    mscale_all_dim: float  # denominator of the cos/sin multiplier; also scales the softmax

    @property
    def rotary_scale(self) -> float:
        """Multiply cos and sin by this (1.0 in K2.6, where mscale equals mscale_all_dim)."""
        return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(self.factor, self.mscale_all_dim)


@dataclass(frozen=True)
class ModelConfig:
    """Hold every number of the model that the engine needs; build it with `load` or `from_dict`."""

    model_type: str  # kimi_k25, kimi_k2 or deepseek_v3
    vocab_size: int  # rows of embed_tokens and lm_head
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # inner width of the dense MLPs (the first `first_k_dense_replace` layers)
    moe_intermediate_size: int  # inner width of one routed or shared expert
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int  # stored as one MLP of inner width n_shared_experts * moe_intermediate_size
    n_routed_experts: int  # router rows
    num_experts_per_tok: int  # experts chosen per token
    first_k_dense_replace: int  # leading layers with a dense MLP in place of the mixture
    q_lora_rank: int  # width between q_a_proj and q_b_proj
    kv_lora_rank: int  # cached latent, without the rope part
    qk_nope_head_dim: int  # per head: query/key columns without position
    qk_rope_head_dim: int  # per head: query columns with position; the key's are shared by all heads
    v_head_dim: int  # per head: value columns
    routed_scaling_factor: float  # multiplies the router weights after normalisation
    rms_norm_eps: float  # input, post-attention and final norm
    rope_theta: float  # base of the rotary frequencies
    rope_scaling: RopeScaling | None  # None: plain rotary frequencies
    norm_topk_prob: bool  # divide the chosen experts' scores by their sum
    max_position_embeddings: int  # longest context the model is meant for
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]  # any of these ends a reply
    tensor_prefix: str  # in front of every text tensor's name: "language_model." or ""
    vision: VisionConfig | None = None  # None: the model reads text only
    num_draft_layers: int = 0  # multi-token prediction layers behind the last layer; they are not read
    latent_norm_eps: float = 1e-6  # q_a and kv_a norm: the original model code leaves its class default there

    @property
    def qk_head_dim(self) -> int:
        """Query/key columns per head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the normalised latent, then the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def dense_layers(self) -> range:
        """Layers with a dense MLP."""
        return range(self.first_k_dense_replace)

    @property
    def moe_layers(self) -> range:
        """Layers with a router, routed experts and a shared expert."""
        return range(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention scores, the YaRN correction included."""
        scale = 1 / math.sqrt(self.qk_head_dim)
        if self.rope_scaling is None:
            return scale
        return scale * _yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read `config.json` of a checkpoint folder, and the end tokens of `generation_config.json` if it is there.

        Raises: ConfigError for a missing, unreadable or contradictory file; UnsupportedModelError for another model.
        """
        path = Path(folder) / CONFIG_NAME
        data = _read_config(path)
        generation = Fields(read_generation_config(Path(folder)), str(Path(folder) / GENERATION_NAME))
        config = cls.from_dict(data, str(path))
        generation.check_ids("eos_token_id", config.vocab_size)
        ends = dict.fromkeys([*config.eos_token_ids, *generation.token_ids("eos_token_id")])
        if not ends:
            raise ConfigError(
                f"{path}: eos_token_id: expected an end token here or in {GENERATION_NAME}, got none",
                hint="without one, the continuation of a text would never end",
            )
        return replace(config, eos_token_ids=tuple(ends))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> ModelConfig:
        """Build the configuration from the parsed `config.json`; `source` names it in errors.

        Raises: ConfigError, UnsupportedModelError.
        """
        top = Fields(data, source)
        model_type = top.text("model_type")
        if model_type == MULTIMODAL_MODEL_TYPE:
            text = Fields(top.json_object("text_config"), f"{source}: text_config")
            text.must_be_one_of("model_type", TEXT_MODEL_TYPES, "the language model inside kimi_k25 is a K2")
            prefix = "language_model."
        elif model_type in TEXT_MODEL_TYPES:
            text, prefix = top, ""
        else:
            raise UnsupportedModelError(
                f"{source}: model_type: expected {MULTIMODAL_MODEL_TYPE} or {' or '.join(TEXT_MODEL_TYPES)}, "
                f"got {shown(model_type)}",
                hint="hybrid-k2 runs the Kimi K2 family only (Kimi K2.5 and K2.6)",
            )
        _refuse_other_mathematics(top, text)
        config = cls(
            model_type=model_type,
            tensor_prefix=prefix,
            bos_token_id=top.token_id("bos_token_id", text.token_id("bos_token_id", None)),
            pad_token_id=top.token_id("pad_token_id", text.token_id("pad_token_id", None)),
            eos_token_ids=tuple(dict.fromkeys([*top.token_ids("eos_token_id"), *text.token_ids("eos_token_id")])),
            **_text_sizes(text),
            **_rope(text),
        )
        _check_sizes(config, text.place)
        for fields, name in product((top, text), ("bos_token_id", "pad_token_id", "eos_token_id")):
            fields.check_ids(name, config.vocab_size)
        if _check_quantization(top, text):
            _check_int4_sizes(config, text.place)
        if model_type != MULTIMODAL_MODEL_TYPE:
            return config
        return replace(config, vision=VisionConfig.from_fields(top, config.hidden_size))


def announces_int4(folder: Path) -> bool:
    """Say whether a checkpoint's configuration announces INT4 weights; its tensors decide. Raises: ConfigError."""
    path = Path(folder) / CONFIG_NAME
    top = Fields(_read_config(path), str(path))
    text = Fields(top.json_object("text_config"), f"{path}: text_config") if "text_config" in top.data else top
    return _check_quantization(top, text)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint states about sampling; it may have no such file. Raises: ConfigError."""
    path = folder / GENERATION_NAME
    if not os.path.lexists(path):
        return {}
    return parse_json_object(read_file(path, ConfigError), str(path), ConfigError)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if not path.parent.is_dir():
            kind = "a file" if path.parent.exists() else "a path that does not exist"
            raise ConfigError(f"{path.parent}: expected a checkpoint folder, got {kind}")
        names = {one.name for one in path.parent.iterdir()}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path.parent}: cannot be read: {reason}") from None
    if path.name not in names:
        contents = f"a folder without {path.name}" if names else "an empty folder"
        raise ConfigError(
            f"{path.parent}: expected a checkpoint with {path.name}, got {contents}",
            hint="give the folder that holds config.json and the model's .safetensors files",
        )
    return parse_json_object(read_file(path, ConfigError), str(path), ConfigError)


def _refuse_other_mathematics(top: Fields, text: Fields) -> None:
    for name, expected, reason in _FIXED_FIELDS:
        text.must_be(name, expected, reason)
    top.must_be("tie_word_embeddings", False, "lm_head is a tensor of its own")
    for name in ("n_group", "topk_group"):
        text.integer(name)  # the class default of other implementations is not 1, so absence is not "1"
        text.must_be(name, 1, "experts are chosen among all, not within groups")
    text.must_be("num_key_value_heads", text.integer("num_attention_heads"), "latent attention has one key per head")
    if text.data.get("q_lora_rank", 0) is None:
        raise UnsupportedModelError(
            f"{text.place}: q_lora_rank: expected an integer, got null "
            "(not implemented: queries always pass through q_a_proj and q_b_proj)"
        )


def _text_sizes(text: Fields) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        name: text.integer(name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "n_shared_experts",
            "n_routed_experts",
            "num_experts_per_tok",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
        )
    }
    sizes["first_k_dense_replace"] = text.integer("first_k_dense_replace", minimum=0)
    # Draft (multi-token prediction) layers stand after the last layer and do not change the model's output:
    # any number of them is accepted, and their tensors are not read.
    if "num_nextn_predict_layers" in text.data:
        sizes["num_draft_layers"] = text.integer("num_nextn_predict_layers", minimum=0)
    sizes["routed_scaling_factor"] = text.number("routed_scaling_factor")
    sizes["rms_norm_eps"] = text.number("rms_norm_eps")
    sizes["norm_topk_prob"] = text.flag("norm_topk_prob")
    return sizes


def _rope(text: Fields) -> dict[str, Any]:
    """Read rotary base and scaling in the original spelling, or from the `rope_parameters` of newer saves."""
    key = "rope_parameters" if text.data.get("rope_parameters") is not None else "rope_scaling"
    if text.data.get(key) is None:
        return {"rope_theta": text.number("rope_theta", above=1.0), "rope_scaling": None}
    scaling = Fields(text.json_object(key), f"{text.place}: {key}")
    theta = (scaling if "rope_theta" in scaling.data else text).number("rope_theta", above=1.0)
    kind = "rope_type" if "rope_type" in scaling.data else "type"
    if key == "rope_parameters" and scaling.data.get(kind) == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling.must_be_one_of(kind, ("yarn",), "the only context extension of the K2 family")
    scaling.must_be("attention_factor", None, "the multiplier follows from mscale and mscale_all_dim")
    scaling.must_be("truncate", True, "the correction range is rounded to whole dimensions")
    yarn = RopeScaling(
        factor=scaling.number("factor"),
        original_max_position_embeddings=scaling.integer("original_max_position_embeddings"),
        beta_fast=scaling.number("beta_fast"),
        beta_slow=scaling.number("beta_slow"),
        mscale=scaling.number("mscale"),
        mscale_all_dim=scaling.number("mscale_all_dim"),
    )
    if yarn.factor < 1:
        raise ConfigError(f"{scaling.place}: factor: expected at least 1, got {yarn.factor}")
    if yarn.beta_fast < yarn.beta_slow:
        raise ConfigError(
            f"{scaling.place}: beta_fast: expected at least beta_slow = {yarn.beta_slow}, got {yarn.beta_fast}"
        )
    return {"rope_theta": theta, "rope_scaling": yarn}


def _check_sizes(config: ModelConfig, place: str) -> None:
    if config.num_experts_per_tok > config.n_routed_experts:
        raise ConfigError(
            f"{place}: num_experts_per_tok: expected at most n_routed_experts = {config.n_routed_experts}, "
            f"got {config.num_experts_per_tok}"
        )
    if config.num_hidden_layers > MAX_LAYERS:
        raise ConfigError(f"{place}: num_hidden_layers: expected at most {MAX_LAYERS}, got {config.num_hidden_layers}")
    if config.first_k_dense_replace > config.num_hidden_layers:
        raise ConfigError(
            f"{place}: first_k_dense_replace: expected at most num_hidden_layers = {config.num_hidden_layers}, "
            f"got {config.first_k_dense_replace}"
        )
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"{place}: qk_rope_head_dim: expected an even number, got {config.qk_rope_head_dim}")


def _check_quantization(top: Fields, text: Fields) -> bool:
    """Say whether the configuration announces INT4 weights; refuse every other quantisation."""
    holder = next((one for one in (text, top) if one.data.get("quantization_config") is not None), None)
    if holder is None:
        return False
    quantization = Fields(holder.json_object("quantization_config"), f"{holder.place}: quantization_config")
    quantization.must_be_one_of("quant_method", ("compressed-tensors",), "the INT4 format of K2.5/K2.6")
    quantization.must_be_one_of("format", ("pack-quantized",), "the INT4 format of K2.5/K2.6")
    quantization.must_be("kv_cache_scheme", None, "the KV cache is not quantised by the checkpoint")
    for name, group in quantization.json_object("config_groups").items():
        if not isinstance(group, dict):
            raise ConfigError(f"{quantization.place}: config_groups.{name}: expected an object, got {shown(group)}")
        fields = Fields(group, f"{quantization.place}: config_groups.{name}")
        for activations in ("input_activations", "output_activations"):
            fields.must_be(activations, None, "activations are not quantised by the checkpoint")
        weights = Fields(fields.json_object("weights"), f"{fields.place}.weights")
        for field, expected in _INT4_WEIGHTS:
            weights.must_be(field, expected, "weights are 4-bit integers in groups of 32 with one scale each")
    return True


def _check_int4_sizes(config: ModelConfig, place: str) -> None:
    for name in ("hidden_size", "moe_intermediate_size"):
        size = getattr(config, name)
        if size % INT4_GROUP:
            raise UnsupportedModelError(
                f"{place}: {name}: expected a multiple of {INT4_GROUP}, got {size} "
                f"(not implemented: INT4 groups that are not {INT4_GROUP} columns wide)"
            )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

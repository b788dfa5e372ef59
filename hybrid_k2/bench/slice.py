"""A slice of a model: a few layers with the widths of K2.6, or a part of them, random weights in the real formats.

And the sizes of K2.6 as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hybrid_k2.checkpoint.tensors import TensorSpec, expected_tensors
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import HardwareError
from hybrid_k2.placement.sizes import format_bytes
from hybrid_k2.vision_config import VisionConfig

CONTEXT = 262144  # tokens that a model of the family has positions for
YARN = {
    "type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def widths(scale: int = 1) -> dict[str, int]:
    """Return the widths of K2.6 divided by this: of the model, its experts and its heads' number, not of a head."""
    return {
        "hidden_size": 7168 // scale, "intermediate_size": 18432 // scale, "moe_intermediate_size": 2048 // scale,
        "num_attention_heads": 64 // scale, "q_lora_rank": 1536 // scale, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    }  # fmt: skip


def slice_fields(sizes: Mapping[str, int], layers: int, experts: int) -> dict[str, Any]:
    """Return the `config.json` of a text model of the K2 family: one dense layer, MoE layers, a small vocabulary."""
    return {
        "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 4096, **sizes,
        "num_hidden_layers": layers, "num_key_value_heads": sizes["num_attention_heads"], "n_shared_experts": 1,
        "n_routed_experts": experts, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "routed_scaling_factor": 2.827, "hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False,
        "rope_theta": 50000.0, "rope_scaling": YARN, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def slice_config(sizes: Mapping[str, int], layers: int, experts: int, source: str) -> ModelConfig:
    """Describe such a model."""
    return ModelConfig.from_dict(slice_fields(sizes, layers, experts), source)


def k26_config() -> ModelConfig:
    """Describe K2.6, for plans; its checkpoint need not be here."""
    text = slice_config(widths(), 61, 384, "K2.6")
    vision = VisionConfig(
        patch_size=14, hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        grid_rows=64, grid_columns=64, text_hidden_size=text.hidden_size, projector_norm_eps=1e-5,
    )  # fmt: skip
    return replace(text, vocab_size=163840, vision=vision)


def write_slice(folder: Path, config: ModelConfig) -> None:
    """Write the checkpoint, its routed experts in INT4. Raises: HardwareError where there is no room."""
    tensors: dict[str, Tensor] = {}
    for spec in expected_tensors(config, lambda name: ".experts." in name and name.endswith("weight_packed")):
        if spec.name.endswith("weight_shape"):
            packed = tensors[spec.name.replace("weight_shape", "weight_packed")]
            tensors[spec.name] = torch.tensor([packed.shape[0], packed.shape[1] * 8], dtype=torch.int32)
        else:
            tensors[spec.name] = _random(spec)
    file = folder / "model.safetensors"
    try:
        save_file(tensors, file)
    except (OSError, SafetensorError) as error:
        size = format_bytes(sum(tensor.nbytes for tensor in tensors.values()))
        raise HardwareError(
            f"{file}: expected to write {size}, got: {error}",
            hint="point TMPDIR at a folder with room, or ask for fewer layers or experts",
        ) from error


def _random(spec: TensorSpec) -> Tensor:
    """Draw values of about the size of real ones."""
    if spec.name.endswith("weight_packed"):
        return torch.randint(-(2**31), 2**31, spec.shape, dtype=torch.int32)
    if spec.name.endswith("weight_scale"):
        return torch.rand(spec.shape).add_(0.5).mul_(0.01).to(torch.bfloat16)
    if len(spec.shape) == 1:
        return torch.zeros(spec.shape) if "bias" in spec.name else torch.ones(spec.shape).to(torch.bfloat16)
    return torch.randn(spec.shape).mul_(spec.shape[-1] ** -0.5).to(torch.bfloat16)

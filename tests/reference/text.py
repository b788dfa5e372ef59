"""The whole text model of one sequence in float64, from the tensors of a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_k2.config import ModelConfig
from tests.generators import dequantized
from tests.reference import mla, moe

Weights = dict[str, Tensor]


def plain_weights(tensors: Weights, config: ModelConfig) -> Weights:
    """Drop the checkpoint's prefix and `.weight`, and dequantise what is packed."""
    weights = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(config.tensor_prefix)
        if name.endswith(".weight_packed"):
            weights[short.removesuffix(".weight_packed")] = dequantized(
                tensor, tensors[name.replace("_packed", "_scale")]
            )
        elif not name.endswith((".weight_scale", ".weight_shape")):
            weights[short.removesuffix(".weight")] = tensor
    return weights


def below(weights: Weights, prefix: str) -> Weights:
    """Take the tensors below a prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def logits(token_ids: list[int], weights: Weights, config: ModelConfig) -> Tensor:
    """Compute the logits after every token; `weights` as `plain_weights` returns them."""
    x = weights["model.embed_tokens"].double()[token_ids]  # [T, hidden]
    for layer in range(config.num_hidden_layers):
        w = below(weights, f"model.layers.{layer}.")
        normal = mla.rms_norm(x, w["input_layernorm"].double(), config.rms_norm_eps)  # [T, hidden]
        x = x + mla.attention(normal, below(w, "self_attn."), config)  # [T, hidden]
        normal = mla.rms_norm(x, w["post_attention_layernorm"].double(), config.rms_norm_eps)  # [T, hidden]
        mlp = below(w, "mlp.")
        if layer in config.dense_layers:
            x = x + moe.swiglu(normal, mlp["gate_proj"], mlp["up_proj"], mlp["down_proj"])  # [T, hidden]
        else:
            x = x + moe.mixture(normal, mlp, config)  # [T, hidden]
    normal = mla.rms_norm(x, weights["model.norm"].double(), config.rms_norm_eps)  # [T, hidden]
    return normal @ weights["lm_head"].double().T  # [T, vocab]


def random_ids(count: int, config: ModelConfig, seed: int) -> list[int]:
    """Draw token ids."""
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

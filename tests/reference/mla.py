"""Latent attention of one whole sequence in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybrid_k2.config import ModelConfig

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows."""
    mean_square = x.square().mean(-1, keepdim=True)  # [T, 1]
    return x / torch.sqrt(mean_square + eps) * weight  # [T, n]


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """Compute the angle per position of each pair, one at a time."""
    size, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    frequencies = [theta ** (-2 * i / size) for i in range(size // 2)]  # [rope/2]
    if yarn is None:
        return frequencies
    # A frequency turns n times over the original context at this (fractional) pair.
    pair = [
        size * math.log(yarn.original_max_position_embeddings / (2 * math.pi * n)) / (2 * math.log(theta))
        for n in (yarn.beta_fast, yarn.beta_slow)
    ]
    low, high = max(math.floor(pair[0]), 0), min(math.ceil(pair[1]), size - 1)
    result = []
    for i, f in enumerate(frequencies):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        result.append(f * (1 - ramp) + f / yarn.factor * ramp)
    return result  # [rope/2]


def rope_multiplier(config: ModelConfig) -> float:
    """Compute YaRN's factor on cos and sin."""
    yarn = config.rope_scaling
    if yarn is None or yarn.factor <= 1:
        return 1.0
    return (0.1 * yarn.mscale * math.log(yarn.factor) + 1) / (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1)


def softmax_scale(config: ModelConfig) -> float:
    """Compute the factor on the scores, with YaRN's temperature."""
    yarn = config.rope_scaling
    m = 1.0 if yarn is None or yarn.factor <= 1 else 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1
    return m * m / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)


def rotate(x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """Rotate pairs (2i, 2i+1) as complex numbers."""
    frequencies = torch.tensor(inverse_frequencies(config), dtype=torch.float64)  # [rope/2]
    angles = positions.double()[:, None] * frequencies  # [T, rope/2]
    turns = torch.polar(torch.full_like(angles, rope_multiplier(config)), angles)  # [T, rope/2] complex
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).clone())  # [T, (heads,) rope/2] complex
    turns = turns.reshape(len(turns), *[1] * (pairs.dim() - 2), -1)  # [T, (1,) rope/2] complex
    return torch.view_as_real(pairs * turns).flatten(-2)  # [T, (heads,) rope]


def attention(x: Tensor, weights: Weights, config: ModelConfig) -> Tensor:
    """Attend within one sequence; `weights` are named as below `self_attn.` in a checkpoint, without `.weight`."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    positions = torch.arange(len(x))  # [T]
    x = x.double()  # [T, hidden]
    q_low = rms_norm(x @ w["q_a_proj"].T, w["q_a_layernorm"], config.latent_norm_eps)  # [T, q_lora]
    q = (q_low @ w["q_b_proj"].T).view(len(x), heads, nope + rope)  # [T, heads, nope + rope]
    q = torch.cat((q[..., :nope], rotate(q[..., nope:], positions, config)), -1)  # [T, heads, nope + rope]
    latent = x @ w["kv_a_proj_with_mqa"].T  # [T, kv_lora + rope]
    c = rms_norm(latent[:, : config.kv_lora_rank], w["kv_a_layernorm"], config.latent_norm_eps)  # [T, kv_lora]
    k_rope = rotate(latent[:, config.kv_lora_rank :], positions, config)  # [T, rope]
    kv = (c @ w["kv_b_proj"].T).view(len(x), heads, nope + config.v_head_dim)  # [T, heads, nope + value]
    k = torch.cat((kv[..., :nope], k_rope[:, None].expand(-1, heads, -1)), -1)  # [T, heads, nope + rope]
    scores = torch.einsum("thd,shd->hts", q, k) * softmax_scale(config)  # [heads, T, T]
    later = positions[None, :] > positions[:, None]  # [T, T]
    probabilities = scores.masked_fill(later, -torch.inf).softmax(-1)  # [heads, T, T]
    values = torch.einsum("hts,shv->thv", probabilities, kv[..., nope:])  # [T, heads, value]
    return values.flatten(1) @ w["o_proj"].T  # [T, hidden]

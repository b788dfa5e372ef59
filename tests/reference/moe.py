"""The router and the mixture of experts in float64, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_k2.config import ModelConfig

Weights = dict[str, Tensor]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Compute one MLP."""
    g = x @ gate.double().T  # [.., inner]
    inner = g / (1 + torch.exp(-g)) * (x @ up.double().T)  # [.., inner]
    return inner @ down.double().T  # [.., hidden]


def route(x: Tensor, gate: Tensor, bias: Tensor, config: ModelConfig) -> list[dict[int, float]]:
    """Return, per token, the weight of each chosen expert."""
    scores = 1 / (1 + torch.exp(-(x.double() @ gate.double().T)))  # [T, E]
    routing = []
    for row, biased in zip(scores.tolist(), (scores + bias.double()).tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda expert: (-biased[expert], expert))  # [E]
        chosen = best[: config.num_experts_per_tok]  # [K]
        total = sum(row[expert] for expert in chosen) + 1e-20 if config.norm_topk_prob else 1.0
        routing.append({expert: row[expert] / total * config.routed_scaling_factor for expert in chosen})
    return routing


def mixture(x: Tensor, weights: Weights, config: ModelConfig) -> Tensor:
    """Compute routed and shared experts; `weights` are named as below `mlp.` in a checkpoint, without `.weight`."""
    x = x.double()  # [T, hidden]
    out = swiglu(x, *(weights[f"shared_experts.{part}_proj"] for part in ("gate", "up", "down")))  # [T, hidden]
    for token, experts in enumerate(route(x, weights["gate"], weights["gate.e_score_correction_bias"], config)):
        for expert, weight in experts.items():
            matrices = (weights[f"experts.{expert}.{part}_proj"] for part in ("gate", "up", "down"))
            out[token] += weight * swiglu(x[token], *matrices)  # [hidden]
    return out

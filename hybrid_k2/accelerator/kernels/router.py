"""Choose the experts of each token from the router's logits, in fp32; see `hybrid_k2/model/router.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_k2.accelerator.kernels.bf16 import FUSED

NO_SCORE = tl.constexpr(1e-20)  # keeps the normalisation finite; the original model's value


@triton.jit
def route_kernel(
    logits,
    bias,
    ids,
    weights,
    experts,
    scale,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Route one token: K times the highest biased score that is left, the lower expert where scores tie."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, WIDTH)
    used = expert < experts
    logit = tl.load(logits + token * experts + expert, mask=used, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logit))
    biased = score + tl.load(bias + expert, mask=used, other=0.0)
    biased = tl.where(biased == biased, biased, float("inf"))  # noqa: PLR0124 (a NaN sorts first, as in torch)
    left = used
    total = 0.0
    place = tl.arange(0, triton.next_power_of_2(K))
    chosen = tl.zeros((triton.next_power_of_2(K),), tl.int32)
    chosen_scores = tl.zeros((triton.next_power_of_2(K),), tl.float32)
    for k in tl.static_range(K):
        highest = tl.max(tl.where(left, biased, -float("inf")), 0)
        best = tl.min(tl.where(left & (biased == highest), expert, WIDTH), 0)
        value = tl.sum(tl.where(expert == best, score, 0.0), 0)
        total += value
        chosen = tl.where(place == k, best, chosen)
        chosen_scores = tl.where(place == k, value, chosen_scores)
        left = left & (expert != best)
    if NORMALISE:
        chosen_scores = chosen_scores / (total + NO_SCORE)
    at = token * K + place
    tl.store(ids + at, chosen, mask=place < K)
    tl.store(weights + at, chosen_scores * scale, mask=place < K)


def route(logits: Tensor, bias: Tensor, experts_per_token: int, normalise: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Choose by sigmoid plus correction bias, best first, and weigh by the sigmoid alone.

    Shapes: logits [T, E] fp32, bias [E] fp32 -> ids [T, K] int32, weights [T, K] fp32.
    Raises: ValueError for more experts per token than there are.
    """
    tokens, experts = logits.shape
    if not 0 < experts_per_token <= experts:
        raise ValueError(f"experts per token: expected 1 to {experts}, got {experts_per_token}")
    ids = torch.empty(tokens, experts_per_token, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, experts_per_token, dtype=torch.float32, device=logits.device)
    route_kernel[tokens,](
        logits.contiguous(), bias, ids, weights, experts, scale,
        K=experts_per_token, WIDTH=triton.next_power_of_2(experts), NORMALISE=normalise, **FUSED,
    )  # fmt: skip
    return ids, weights

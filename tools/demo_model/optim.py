"""Optimise matrices with Muon and the rest with AdamW, under a warm-up, constant, decay schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WARMUP_STEPS = 60
FLOOR = 0.02
MOMENTUM, WEIGHT_DECAY = 0.95, 0.05


def rate_factor(step: int, fraction: float, decay_from: float) -> float:
    """Return the share of the peak learning rate at this step and fraction of the run."""
    decay = 1 - (1 - FLOOR) * max(0.0, fraction - decay_from) / (1 - decay_from)
    return min(1.0, (step + 1) / WARMUP_STEPS) * decay


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Tell whether Muon takes the parameter."""
    return p.ndim >= 2 and not name.endswith(("embed_tokens", "lm_head", "mlp.gate"))


def orthogonalise(grad: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values near one by Newton-Schulz iteration, for a stack of matrices too."""
    x = grad.bfloat16() if grad.is_cuda else grad
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(grad.dtype)


@torch.no_grad()
def muon_step(p: nn.Parameter, grad: Tensor, momentum: Tensor, rate: float) -> None:
    """Step along orthogonalised momentum, scaled so that its size matches AdamW's (Moonlight's rule)."""
    momentum.mul_(MOMENTUM).add_(grad)
    update = orthogonalise(grad + MOMENTUM * momentum)
    p.mul_(1 - rate * WEIGHT_DECAY).add_(update, alpha=-rate * 0.2 * max(p.shape[-2:]) ** 0.5)


def adam(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """Make the optimiser of embeddings, head, router and norms; each step sets the rate."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)

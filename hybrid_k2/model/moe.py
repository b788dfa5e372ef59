"""One mixture-of-experts layer: its router, the routed experts in host memory, the shared expert where the plan says.

What computes when, and what beside what, is the schedule's (`schedule.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybrid_k2.experts import ExpertsBackend
from hybrid_k2.model.layers import SwiGlu
from hybrid_k2.model.router import Router


@dataclass(frozen=True)
class Moe:
    """Hold the parts of the layer: its output is the weighted sum of the routed experts, plus the shared one."""

    router: Router
    experts: ExpertsBackend
    shared: SwiGlu


def mixed(routed: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    """Add the outputs of the routed experts and of the shared one.

    The original model casts the sum of the routed experts before it adds the shared one.
    Shapes: routed [T, hidden] fp32, shared and residual [T, hidden] -> [T, hidden] in the residual's dtype and place.
    """
    return routed.to(residual) + shared.to(residual)

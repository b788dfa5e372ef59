"""One mixture-of-experts layer: its router, the routed experts in host memory, the shared expert where the plan says.

Some of the routed experts, the hot ones, may be the accelerator's.

What computes when, and what beside what, is the schedule's (`schedule.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybrid_k2.accelerator import HotExperts
from hybrid_k2.experts import ExpertsBackend
from hybrid_k2.experts.usage import LayerUsage
from hybrid_k2.model.layers import SwiGlu
from hybrid_k2.model.router import Router, Routing


@dataclass(frozen=True)
class Moe:
    """Hold the parts of the layer: its output is the weighted sum of the routed experts, plus the shared one.

    `usage`, where there is one, counts what the router chooses.
    """

    router: Router
    experts: ExpertsBackend
    shared: SwiGlu
    hot: HotExperts | None = None
    usage: LayerUsage | None = None

    def route(self, x: Tensor) -> tuple[Routing, Tensor]:
        """Choose the experts of each row, and count them; return also the numbers of those that the host has.

        Shapes: x [T, hidden] -> a routing of T rows; [T, K] int32, -1 for hot experts.
        """
        routing = self.router(x)
        on_host = routing.ids if self.hot is None else self.hot.elsewhere(routing.ids)
        if self.usage is not None:
            self.usage.add(routing.ids, on_host)
        return routing, on_host


def mixed(routed: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    """Add the outputs of the routed experts and of the shared one.

    The original model casts the sum of the routed experts before it adds the shared one.
    Shapes: routed [T, hidden] fp32, shared and residual [T, hidden] -> [T, hidden] in the residual's dtype and place.
    """
    return routed.to(residual) + shared.to(residual)

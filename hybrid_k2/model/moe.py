"""One mixture-of-experts layer: routed experts by the backend in host memory, the shared expert where the plan says."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybrid_k2.experts import ExpertsBackend
from hybrid_k2.model.layers import SwiGlu
from hybrid_k2.model.router import Router, Routing

SLOT = 0  # one batch is in flight at a time; the second slot is for two that alternate


@dataclass(frozen=True)
class Moe:
    """Add the weighted outputs of the routed experts and the output of the shared one."""

    router: Router
    experts: ExpertsBackend
    shared: SwiGlu

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer for each row.

        Shapes: x [T, hidden] -> [T, hidden] in x's dtype and on x's device.
        """
        hidden, routing = x.cpu(), self._route(x)
        if self.shared.gate.device.type == "cpu":
            # Both want the same cores: side by side they would only take turns.
            routed = self.experts.forward(hidden, routing.ids, routing.weights)  # [T, hidden] fp32
            shared = self.shared(x)  # [T, hidden]
        else:
            try:
                self.experts.submit(SLOT, hidden, routing.ids, routing.weights)
                shared = self.shared(x)  # [T, hidden], while the host computes the routed experts
                routed = self.experts.wait(SLOT)  # [T, hidden] fp32
            except BaseException:  # Ctrl-C may come anywhere, also while `submit` or `wait` returns
                self.experts.abandon(SLOT)
                raise
        # The original model casts the sum of the routed experts before it adds the shared one.
        return routed.to(x) + shared.to(x)

    def _route(self, x: Tensor) -> Routing:
        routing = self.router(x)
        return Routing(routing.ids.cpu(), routing.weights.cpu())

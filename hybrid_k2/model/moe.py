"""One mixture-of-experts layer: its router, the routed experts in host memory, the shared expert where the plan says.

Some of the routed experts, the hot ones, may be the accelerator's.

What computes when, and what beside what, is the schedule's (`schedule.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hybrid_k2.accelerator import HotExperts
from hybrid_k2.dense import HostMatrix
from hybrid_k2.experts import ExpertsBackend
from hybrid_k2.experts.base import ELSEWHERE
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.experts.usage import LayerUsage
from hybrid_k2.model.layers import SwiGlu, linear_all, native_of_one_kind
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

    def on_host(self, routing: Routing, live: Tensor | None = None) -> Tensor:
        """Return the numbers of the chosen experts that the host has, and count the choice.

        Rows that are not `live` choose nothing.
        Shapes: a routing of T rows, live [T] bool (None: all) -> [T, K] int32, -1 for hot experts and such rows.
        """
        on_host = routing.ids if self.hot is None else self.hot.elsewhere(routing.ids)
        self.count(routing.ids, on_host, live)
        return on_host if live is None else torch.where(live[:, None], on_host, ELSEWHERE)

    @property
    def any_batch(self) -> bool:
        """Whether a row has the same bits whatever other rows there are."""
        native = isinstance(self.experts, NativeExperts) and isinstance(self.router.weight, HostMatrix)
        return native and self.shared.any_batch

    def count(self, ids: Tensor, on_host: Tensor, live: Tensor | None = None) -> None:
        """Count a choice, where choices are counted; `on_host` is -1 for hot experts.

        Shapes: [T, K] int32 each, live [T] bool (None: all).
        """
        if self.usage is not None:
            self.usage.add(ids, on_host, live)

    def begin(self, x: Tensor) -> tuple[Routing, Callable[[], Tensor]]:
        """Route rows, and return what computes their shared expert.

        Where nobody waits for the routing alone: native matrices that read the rows are multiplied in one go, so that
        the threads are asked once.
        Shapes: x [T, hidden].
        """
        reading = self.router.weight, self.shared.gate, self.shared.up
        if x.dtype != torch.float32 or not native_of_one_kind(reading):
            return self.router(x), partial(self.shared, x)
        logits, gate, up = linear_all(x, reading)
        return self.router.route(logits), partial(self.shared.finish, gate, up)


def mixed(routed: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    """Add the outputs of the routed experts and of the shared one.

    The original model casts the sum of the routed experts before it adds the shared one.
    Shapes: routed [T, hidden] fp32, shared and residual [T, hidden] -> [T, hidden] in the residual's dtype and place.
    """
    return routed.to(residual) + shared.to(residual)

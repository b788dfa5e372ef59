"""Choose the experts of each token, in fp32 whatever the dtype around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.dense import HostMatrix
from hybrid_k2.model import host_rows
from hybrid_k2.model.layers import rowwise

NO_SCORE = 1e-20  # keeps the normalisation finite where every chosen score underflows; the original model's value


@dataclass(frozen=True)
class Routing:
    """Hold the experts of each token, best first, and the weights of their outputs.

    Shapes: ids [T, K] int32, weights [T, K] fp32.
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Router:
    """Score experts with a sigmoid; choose by score plus correction bias, weigh by score alone.

    `kernel`: choose and weigh in one launch by Triton's, the same but for the last bits of the sigmoid.
    With a HostMatrix choosing and weighing are native too, and a row's routing depends on that row alone, bit for bit;
    its rows beyond the experts are padding.
    Shapes: weight [E, hidden], bias [E] fp32.
    """

    weight: Tensor | HostMatrix
    bias: Tensor
    experts_per_token: int
    normalise: bool
    scale: float
    kernel: bool = False

    def __call__(self, x: Tensor) -> Routing:
        """Route each row.

        Shapes: x [T, hidden].
        """
        return self.route(self._logits(x.to(self.bias.device)))

    def route(self, logits: Tensor) -> Routing:
        """Route rows by their products with the weight; those with its padding are left out.

        Experts whose biased scores tie rank by index, the lower first, so that a choice is reproducible.
        Shapes: logits [T, rows of the weight] fp32.
        """
        if self.kernel:
            from hybrid_k2.accelerator.kernels.router import route

            return Routing(*route(logits, self.bias, self.experts_per_token, self.normalise, self.scale))
        if isinstance(self.weight, HostMatrix) and host_rows.on_host(logits):
            threads, rule = self.weight.runtime, (self.experts_per_token, self.normalise, self.scale)
            return Routing(*host_rows.route(threads, logits, self.bias, *rule))
        scores = self._scores(logits)  # [T, E]
        order = torch.sort(scores + self.bias, dim=-1, descending=True, stable=True).indices  # [T, E]
        ids = order[:, : self.experts_per_token]  # [T, K]
        return Routing(ids.int(), self.weigh(scores, ids))

    def scores(self, x: Tensor) -> Tensor:
        """Score all experts for each row.

        Shapes: x [T, hidden] -> [T, E] fp32.
        """
        return self._scores(self._logits(x.to(self.bias.device)))

    def weigh(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Return the weights of chosen experts.

        Shapes: scores [T, E] fp32, ids [T, K] int64 -> [T, K] fp32.
        """
        weights = scores.gather(-1, ids)  # [T, K]
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + NO_SCORE)
        return weights * self.scale

    def _scores(self, logits: Tensor) -> Tensor:
        return rowwise(torch.sigmoid, logits[:, : self.bias.shape[-1]])

    def _logits(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, HostMatrix):
            return self.weight(x.float())
        return functional.linear(x.float(), self.weight.float())

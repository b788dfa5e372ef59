"""Hot experts: routed experts of a layer that the accelerator computes, while the host computes the others.

A batch's pairs of token and expert are split by where the expert is: the host gets `elsewhere(ids)`, the accelerator
computes the rest with `forward`. Which experts are hot changes between steps alone, by `exchange`; what a change needs
is prepared in the background, with `copy` and `bring`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from hybrid_k2.experts.base import ELSEWHERE
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.experts.l32 import L32Expert


class HotExperts(ABC):
    """Hold and compute the hot experts of one layer."""

    def __init__(self, experts: Iterable[int], total: int, router: torch.device) -> None:
        """`experts`: those that are held, of `total`; `router`: where the numbers of chosen experts come from."""
        self.experts = frozenset(experts)
        self._hot = torch.zeros(total, dtype=torch.bool, device=router)  # [E]
        self._hot[sorted(self.experts)] = True

    def elsewhere(self, ids: Tensor) -> Tensor:
        """Return the numbers of the chosen experts that are not hot, and -1 in the place of the others.

        Shapes: ids [T, K] int32, where the router is -> the same.
        """
        return torch.where(self._hot[ids.long()], ELSEWHERE, ids)

    @abstractmethod
    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return each token's weighted sum over the chosen experts that are hot, by ascending number.

        Shapes: hidden [T, H] bf16 or fp32, ids [T, K] int32, weights [T, K] fp32 -> [T, H] fp32, on the accelerator.
        """

    @abstractmethod
    def copy(self, expert: int) -> L32Expert:
        """Return a hot expert's weights, with the checksum that they had; on any thread, while steps run."""

    @abstractmethod
    def bring(self, expert: int, weights: L32Expert) -> None:
        """Bring one expert near, so that `exchange` does not take long; on any thread, while steps run."""

    def exchange(self, old: int, new: int) -> None:
        """Let the expert that was brought take the place of a hot one; between steps, on the accelerator's lane."""
        self._exchange(old, new)
        self.experts = self.experts - {old} | {new}
        self._hot[old], self._hot[new] = False, True

    @abstractmethod
    def _exchange(self, old: int, new: int) -> None:
        """Change the memory: all or, if it raises, nothing."""

    @abstractmethod
    def close(self) -> None:
        """Release the weights."""


class TwinHotExperts(HotExperts):
    """Compute hot experts on the twin's threads, from a layer of its own, by the kernels of the host's."""

    def __init__(self, layer: NativeExperts, experts: Iterable[int]) -> None:
        super().__init__(experts, layer.shape.n_routed_experts, torch.device("cpu"))
        self._layer = layer
        self._brought: dict[int, L32Expert] = {}

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See HotExperts; a row's bits depend on that row and the set of hot experts alone."""
        return self._layer.forward(hidden, torch.where(self._hot[ids.long()], ids, ELSEWHERE), weights)

    def copy(self, expert: int) -> L32Expert:
        """See HotExperts."""
        return self._layer.copy_expert(expert)

    def bring(self, expert: int, weights: L32Expert) -> None:
        """See HotExperts; nothing is nearer than the host's memory."""
        self._brought = {expert: weights}

    def _exchange(self, old: int, new: int) -> None:
        self._layer.replace_expert(old, new, self._brought.pop(new))

    def close(self) -> None:
        """See HotExperts."""
        self._layer.close()

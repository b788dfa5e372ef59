"""Random weights, activations and routing for everybody, and the right answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.peers.exchange import MATRICES, Array, Matrix, Sizes, write_expert
from hybrid_k2.checkpoint import ExpertWeights, PackedWeight
from hybrid_k2.config import INT4_GROUP
from hybrid_k2.experts.reference import expert_ffn

CHECKED_TOKENS = 2  # of each batch, compared with float64
CALLS_TOKENS = 8  # one turn holds calls for about as many tokens, at least one


class Inputs:
    """Draw what all contenders get, and leave it in a folder."""

    def __init__(self, folder: Path, sizes: Sizes, seed: int) -> None:
        self.folder = folder
        self.sizes = sizes
        self.random = torch.Generator().manual_seed(seed)
        self.next_expert = 0
        hidden = torch.randn(sizes.most_tokens, sizes.hidden, generator=self.random).to(torch.bfloat16)
        np.save(folder / "hidden.npy", hidden.view(torch.uint16).numpy())
        checked = hidden[:CHECKED_TOKENS].double()
        self.right = torch.stack([self._expert(number, checked) for number in range(sizes.distinct)])  # [W, checked, H]

    def route(self, tokens: int) -> int:
        """Draw the routing of one turn and return how many distinct experts a call touches, on average.

        Each token has different experts; the first tokens of the calls take theirs in turn, so that a call of one
        token finds them cold.
        """
        calls, k, experts = max(1, CALLS_TOKENS // tokens), self.sizes.top_k, self.sizes.experts
        ids = torch.rand(calls, tokens, experts, generator=self.random).topk(k).indices.to(torch.int32)
        for call in ids:
            call[0] = (torch.arange(k) + self.next_expert) % experts
            self.next_expert = (self.next_expert + k) % experts
        self.ids, self.weights = ids[-1], torch.rand(calls, tokens, k, generator=self.random)
        np.save(self.folder / "ids.npy", ids.numpy())
        np.save(self.folder / "weights.npy", self.weights.numpy())
        self.weights = self.weights[-1]
        return round(sum(len(call.unique()) for call in ids) / calls)

    def error(self, output: Array) -> float:
        """Return the root mean square error of the turn's last call on the checked tokens, relative to the answer."""
        count = min(CHECKED_TOKENS, len(output))
        used = self.right[
            self.ids[:count].long() % self.sizes.distinct, torch.arange(count)[:, None]
        ]  # [checked, K, H]
        right = (used * self.weights[:count, :, None].double()).sum(1)
        got = torch.from_numpy(output[:count]).double()
        return float((got - right).norm() / right.norm())

    def _expert(self, number: int, checked: Tensor) -> Tensor:
        """Draw an expert with values and scales of about the size of real ones; return what it makes of some tokens."""
        inner = (self.sizes.intermediate, self.sizes.hidden)
        shapes = dict(zip(MATRICES, (inner, inner, inner[::-1]), strict=True))
        packed = {name: self._matrix(*shape) for name, shape in shapes.items()}
        write_expert(
            self.folder,
            number,
            {name: Matrix(p.packed.numpy(), p.scale.view(torch.uint16).numpy()) for name, p in packed.items()},
        )
        return expert_ffn(ExpertWeights(**packed), checked)

    def _matrix(self, rows: int, columns: int) -> PackedWeight:
        words = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int32, generator=self.random)
        scale = torch.rand(rows, columns // INT4_GROUP, generator=self.random).add_(0.5).mul_(0.01)
        return PackedWeight(words, scale.to(torch.bfloat16))

"""Split a prompt's routed experts: heavy ones are brought to the accelerator, light ones stay on the host.

An expert that arrives costs its bytes, however many tokens it has; on the host it costs a read of its weights, or the
time of its tokens where that is more. So those with the most tokens go, as many as make both sides end together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_k2.accelerator.stream import TOGETHER, Arrival, ExpertStream
from hybrid_k2.experts.base import ELSEWHERE
from hybrid_k2.experts.usage import LayerUsage

# Fewer tokens are no prompt: an expert has one or two of them, and its weights are read from the host's memory faster
# than they are brought over. A step of so few never waits for its router's choices.
LEAST_TOKENS = 64


@dataclass(frozen=True)
class SplitCosts:
    """Say what an expert costs, in us. copy: to bring it over; on the host, read: its weights, token: each of it."""

    copy: float
    read: float
    token: float

    def on_host(self, tokens: int) -> float:
        """Return the time of the host for an expert with so many tokens."""
        return max(self.read, self.token * tokens) if tokens else 0.0


def heavy_experts(tokens: Mapping[int, int], costs: SplitCosts, coming: Sequence[int] = ()) -> list[int]:
    """Return the experts to bring over, those with the most tokens first: such that the slower side ends earliest.

    tokens: of each expert that the host has and a token needs. coming: experts that are on their way already, which
    costs nothing more.
    """
    rest = sorted((expert for expert in tokens if expert not in coming), key=lambda expert: (-tokens[expert], expert))
    host = sum(costs.on_host(tokens[expert]) for expert in rest)
    best, heavy = host, 0
    for count, expert in enumerate(rest, start=1):
        host -= costs.on_host(tokens[expert])
        slower = max(host, count * costs.copy)
        if slower >= best:
            break  # copies only get more
        best, heavy = slower, count
    return rest[:heavy]


@dataclass(frozen=True)
class Streamed:
    """Hold what was asked for in a layer, and the choices that it concerns.

    Shapes: ids [T, K] int32, -1 for choices that the host computes, or hot experts.
    """

    arrivals: list[Arrival]
    ids: Tensor


class PrefillSplit:
    """Decide for each layer of a prompt which experts are streamed, and ask for them.

    Between two layers, the stream goes on with those experts of the next one that were used most so far; they are
    computed on the accelerator, whatever the prompt then chooses.
    """

    def __init__(self, stream: ExpertStream, costs: SplitCosts, usage: Mapping[int, LayerUsage]) -> None:
        """`usage`: of the layers that have experts."""
        self.stream = stream
        self.costs = costs
        self._usage = dict(usage)
        self._layers = sorted(usage)
        self._coming: tuple[int, list[Arrival]] = (-1, [])  # of a layer

    def begin(self) -> None:
        """Begin a step."""
        self.stream.begin()
        self._coming = (-1, [])

    def choose(self, layer: int, on_host: Tensor, *, alone: bool) -> tuple[Tensor, Streamed]:
        """Return the choices that stay on the host, and what is streamed; the copies begin.

        alone: no other half asks for experts before this one's next layer does. Waits for the router.
        Shapes: on_host [T, K] int32, -1 for experts that are elsewhere -> the same.
        """
        ids = on_host.cpu()
        experts, counts = torch.unique(ids[ids >= 0], return_counts=True)
        tokens = dict(zip(experts.tolist(), counts.tolist(), strict=True))
        coming_to, coming = self._coming
        came = coming if coming_to == layer else []
        here = [arrival.expert for arrival in came]
        heavy = heavy_experts(tokens, self.costs, here)
        arrivals = came + self.stream.ask(layer, heavy)
        self._coming = (-1, [])
        if alone and heavy:
            self._ask_for_next(layer)
        streamed = torch.isin(on_host, torch.tensor(sorted({*here, *heavy}), dtype=torch.int32, device=on_host.device))
        return torch.where(streamed, ELSEWHERE, on_host), Streamed(arrivals, torch.where(streamed, on_host, ELSEWHERE))

    def _ask_for_next(self, layer: int) -> None:
        following = next((each for each in self._layers if each > layer), None)
        if following is not None:
            experts = self.most_used(following)
            self._coming = following, self.stream.ask(following, experts)

    def most_used(self, layer: int) -> list[int]:
        """Return the experts that most tokens chose so far, of those that the host has."""
        counts = self._usage[layer].counts()
        held = self.stream.on_host(layer)
        return sorted((expert for expert in held if counts[expert]), key=lambda expert: -counts[expert])[:TOGETHER]

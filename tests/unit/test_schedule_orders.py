"""Many schedules of the forward pass, of a model that is nothing but their order: no deadlock, no half mixed up."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hybrid_k2.accelerator import (
    Handoff,
    HostTwin,
    Label,
    SubmitHandoff,
)
from hybrid_k2.experts import ExpertsBackend
from hybrid_k2.experts.base import ExpertsShape, QueuedBackend
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.router import Routing
from hybrid_k2.model.schedule import Half, through_layers

SCHEDULES = int(os.environ.get("HYBRID_K2_SCHEDULES", "1500"))  # random ones; a longer run takes 10000


class BoomError(Exception):
    """What a part that goes wrong raises."""


class Toy:
    """A layer whose attention adds its number, and whose parts go wrong when they are told to."""

    device = torch.device("cpu")

    def __init__(self, index: int, experts: ExpertsBackend | None, pause: Callable[[], None]) -> None:
        self.index, self.pause = index, pause
        self.mlp: Any = Moe(self.route, experts, self.shared) if experts else lambda x: 2 * x  # type: ignore[arg-type]

    def attend(self, x: Tensor, *rest: object) -> Tensor:
        self.pause()
        return x + self.index

    def post_norm(self, x: Tensor) -> Tensor:
        return x % 7

    def route(self, x: Tensor) -> Routing:
        return Routing(torch.tensor([[0, 1]], dtype=torch.int32).repeat(len(x), 1), torch.ones(len(x), 2))

    def shared(self, x: Tensor) -> Tensor:
        self.pause()
        return 3 * x


class ToyExperts(QueuedBackend):
    """Multiply with the number of the layer, for each expert."""

    def __init__(self, index: int, queue: ThreadPoolExecutor, pause: Callable[[], None]) -> None:
        super().__init__(ExpertsShape(1, 1, 2, 2), queue)
        self.index, self.pause = index, pause

    nbytes = 0  # type: ignore[assignment]

    def load_expert(self, expert: int, weights: Any) -> None:
        return

    def _compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.pause()
        return hidden * self.index * (ids >= 0).sum(1, keepdim=True)

    def close(self) -> None:
        return


def test_no_schedule_deadlocks_or_mixes_up_the_halves() -> None:
    """Pauses and failures by chance on both lanes; a step that fails is followed by one that is right."""
    chance = random.Random()
    failures = 0

    def pause() -> None:
        dice = chance.random()
        if dice < 0.05:
            time.sleep(chance.random() * 1e-4)
        elif dice < 0.055:
            raise BoomError

    twin = HostTwin()
    with ThreadPoolExecutor(1) as queue:
        experts = {i: ToyExperts(i, queue, pause) for i in (1, 2)}
        layers: list[Any] = [Toy(i, experts.get(i), pause) for i in range(3)]
        handoff: Handoff = SubmitHandoff(experts)
        for step in range(SCHEDULES):
            starts = [torch.full((1, 1), float(chance.randrange(50))) for _ in range(chance.randint(1, 2))]
            halves = [toy_half(slot, start, handoff) for slot, start in enumerate(starts)]
            if step:
                twin.enqueue(handoff.reset, Label("reset"))
            deferred = chance.randint(0, 1)
            for op, label in through_layers(layers, halves, lambda half: None, deferred):
                twin.enqueue(op, label)
            try:
                twin.synchronize(timeout_s=60)
            except BoomError:
                failures += 1
                continue
            for half, start in zip(halves, starts, strict=True):
                assert half._x.item() == toy_result(start.item(), deferred)
    twin.close()
    assert 0 < failures < SCHEDULES / 2


def toy_half(slot: int, x: Tensor, handoff: Handoff) -> Half:
    half = Half(slot, None, None, handoff, x)  # type: ignore[arg-type]
    half._x = x
    half._rotation = x  # type: ignore[assignment]
    return half


def toy_result(x: float, deferred: int) -> float:
    late = 0.0
    for index in range(3):
        x += index
        normal = x % 7
        if index == 0:
            x += 2 * normal
            continue
        waits = deferred if index == 1 else 0  # the last layer defers none
        x += 3 * normal + index * (2 - waits) * normal + late
        late = index * waits * normal
    return x

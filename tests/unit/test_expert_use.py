"""Counting which experts the router chooses: exact, also without an accelerator, and readable while it computes."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from hybrid_k2 import Engine
from hybrid_k2.experts.usage import LayerUsage
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.router import Router, Routing
from tests.generators import write_checkpoint

EXPERTS = 24


def test_counts_are_what_was_chosen() -> None:
    usage = LayerUsage([0] * EXPERTS, torch.device("cpu"))
    chosen: Counter[int] = Counter()
    hot = 0
    for tokens in (1, 0, 7, 33, 1):
        ids = torch.rand(tokens, EXPERTS).argsort()[:, :4].int()
        on_host = torch.where(ids < 5, -1, ids)
        usage.add(ids, on_host)
        chosen.update(ids.flatten().tolist())
        hot += int((ids < 5).sum())
    assert usage.counts() == [chosen[expert] for expert in range(EXPERTS)]
    assert usage.take_hit_rate() == hot / (4 * 42)
    usage.fade()
    assert usage.counts() == [chosen[expert] // 2 for expert in range(EXPERTS)]


def test_an_engine_without_an_accelerator_counts_and_remembers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr("hybrid_k2.engine.kept_usage.remember_usage", refuse)
    routed: Counter[tuple[int, int]] = Counter()
    with Engine.load(write_checkpoint(tmp_path / "model"), "host") as engine:
        layers = {i: layer.mlp for i, layer in enumerate(engine.loaded.text.layers) if isinstance(layer.mlp, Moe)}
        numbers = {id(moe.router.bias): i for i, moe in layers.items()}
        route = Router.route

        def watched(router: Router, logits: torch.Tensor) -> Routing:
            routing = route(router, logits)
            routed.update((numbers[id(router.bias)], expert) for expert in routing.ids.flatten().tolist())
            return routing

        monkeypatch.setattr(Router, "route", watched)
        assert {layer: sum(use.counts) for layer, use in engine.expert_use().items()} == dict.fromkeys(layers, 0)
        engine.logits([3, 77, 5] * 20)
        engine.logits([1])
        uses = engine.expert_use()
        assert uses.keys() == layers.keys() == set(engine.config.moe_layers)
        for layer, use in uses.items():
            assert use.hot == []
            assert use.counts == [routed[layer, expert] for expert in range(engine.config.n_routed_experts)]
            assert sum(use.counts) == 61 * engine.config.num_experts_per_tok
    assert engine.expert_use() == {}


def test_any_thread_may_ask_while_it_computes(tmp_path: Path) -> None:
    with Engine.load(write_checkpoint(tmp_path / "model"), "host") as engine:
        sums: list[int] = []
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                sums.append(sum(sum(use.counts) for use in engine.expert_use().values()))

        asker = threading.Thread(target=ask)
        asker.start()
        for _ in range(10):
            engine.logits([5] * 30)
        done.set()
        asker.join()
        assert sums == sorted(sums)
        assert sums[-1] <= 300 * len(engine.config.moe_layers) * engine.config.num_experts_per_tok

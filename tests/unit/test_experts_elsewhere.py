"""Experts that are computed elsewhere: they add nothing here, need no memory, and may change places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_k2.errors import EngineError
from hybrid_k2.experts import ExpertsRuntime, open_experts
from hybrid_k2.experts.base import ELSEWHERE
from hybrid_k2.experts.cpu import NativeExperts, NativeRuntime
from hybrid_k2.experts.numba_backend import NumbaRuntime
from hybrid_k2.experts.reference import ReferenceRuntime
from hybrid_k2.host.threads import virtual_nodes
from tests.unit.experts_common import (
    error,
    float64_layer,
    load_random_experts,
    native_runtime,
    random_expert,
    random_routing,
    usable_isas,
)

HIDDEN, INNER, EXPERTS, TOP_K = 96, 64, 7, 3


def layer_of(runtime: ExpertsRuntime, room: int | None = None) -> NativeExperts:
    assert isinstance(runtime, NativeRuntime)
    return runtime.make_layer(HIDDEN, INNER, EXPERTS, TOP_K, room)


def masked(ids: Tensor, here: Tensor) -> Tensor:
    """Shapes: ids [T, K] int32, here [E] bool -> [T, K] int32."""
    return torch.where(here[ids.long()], ids, ELSEWHERE)


@pytest.mark.parametrize("name", ["native", "numba", "reference"])
def test_what_is_elsewhere_adds_nothing(name: str) -> None:
    makers = {"numba": lambda: NumbaRuntime(2), "reference": ReferenceRuntime}
    runtime = native_runtime() if name == "native" else makers[name]()
    layer, oracle = runtime.make_layer(HIDDEN, INNER, EXPERTS, TOP_K), float64_layer(HIDDEN, INNER, EXPERTS, TOP_K)
    load_random_experts(layer, oracle)
    for tokens in (0, 1, 6, 70):
        x, (ids, weights) = torch.randn(tokens, HIDDEN), random_routing(tokens, EXPERTS, TOP_K)
        here = torch.rand(EXPERTS) < 0.5
        expected = oracle.forward(x, ids, torch.where(here[ids.long()], weights, 0.0))
        some = (expected != 0).any(dim=1)
        for result in (layer.forward(x, masked(ids, here), weights), submitted(layer, x, masked(ids, here), weights)):
            assert error(result[some], expected[some]) < 1e-3
            assert not result[~some].any()
    with pytest.raises(ValueError, match=r"experts 0\.\.6, got -2"):
        layer.forward(torch.randn(1, HIDDEN), torch.full((1, TOP_K), -2, dtype=torch.int32), torch.ones(1, TOP_K))
    layer.close()
    runtime.close()


def submitted(layer: object, *arguments: Tensor) -> Tensor:
    layer.submit(1, *arguments)  # type: ignore[attr-defined]
    return layer.wait(1, 60)  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_layers_that_share_the_experts_give_the_bits_of_one_that_has_all(nodes: int) -> None:
    """Weights of zero add nothing to a sum, so the whole layer computes either part; places change in between."""
    if not usable_isas():
        native_runtime()
    runtime = open_experts("exact", 2, nodes=virtual_nodes(2, nodes))
    whole = layer_of(runtime)
    experts = load_random_experts(whole)
    order = torch.randperm(EXPERTS).tolist()
    sets = [order[:3], order[3:]]
    parts = [layer_of(runtime, len(held)) for held in sets]
    for part, held in zip(parts, sets, strict=True):
        for expert in held:
            part.load_expert(expert, experts[expert])
    assert sum(part.nbytes for part in parts) == whole.nbytes
    for _ in range(4):
        x, (ids, weights) = torch.randn(9, HIDDEN), random_routing(9, EXPERTS, TOP_K)
        for part, held in zip(parts, sets, strict=True):
            here = torch.zeros(EXPERTS, dtype=torch.bool)
            here[held] = True
            expected = whole.forward(x, ids, torch.where(here[ids.long()], weights, 0.0))
            assert torch.equal(part.forward(x, masked(ids, here), weights), expected)
        first, second = sets[0].pop(0), sets[1].pop(0)
        one, other = parts[0].copy_expert(first), parts[1].copy_expert(second)
        parts[0].replace_expert(first, second, other)
        parts[1].replace_expert(second, first, one)
        sets[0].append(second)
        sets[1].append(first)
        for part, held in zip(parts, sets, strict=True):
            for expert in held:
                part.verify(expert)
                assert part.checksum(expert) == whole.checksum(expert)
    runtime.close()


def test_room_is_kept_and_places_are_checked() -> None:
    runtime = native_runtime()
    layer, other = layer_of(runtime, 2), layer_of(runtime)
    load_random_experts(other)
    layer.load_expert(4, random_expert(HIDDEN, INNER))
    layer.load_expert(1, random_expert(HIDDEN, INNER))
    layer.load_expert(4, random_expert(HIDDEN, INNER))  # again: it has its place
    for call, text in (
        (lambda: layer.load_expert(0, random_expert(HIDDEN, INNER)), "at most 2 of them, got one more, 0"),
        (lambda: layer.replace_expert(0, 2, other.copy_expert(2)), "a loaded one, got 0"),
        (lambda: layer.replace_expert(4, 1, other.copy_expert(1)), "one that is not here, got 1"),
        (lambda: layer_of(runtime, 8), r"room: expected 0\.\.7, got 8"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert layer_of(runtime, 0).nbytes == 0
    layer.replace_expert(4, 2, other.copy_expert(2))
    with pytest.raises(EngineError, match="expert 4: expected it to be loaded"):
        layer.forward(torch.randn(1, HIDDEN), torch.full((1, TOP_K), 4, dtype=torch.int32), torch.ones(1, TOP_K))
    runtime.close()


def test_a_damaged_expert_is_not_copied() -> None:
    runtime = native_runtime()
    layer, other = layer_of(runtime, 1), layer_of(runtime)
    load_random_experts(other)
    layer.load_expert(3, random_expert(HIDDEN, INNER))
    damaged = other.copy_expert(5)
    damaged.w2[1, 1, 100] ^= 4
    layer.replace_expert(3, 5, damaged)
    with pytest.raises(EngineError, match=r"expert 5: expected weights with checksum"):
        layer.copy_expert(5)
    runtime.close()

"""Streamed experts on a GPU: the sums of those that are brought over, and a prompt of a model that streams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybrid_k2.accelerator.stream import PLACES
from hybrid_k2.accelerator.stream_cuda import CudaExpertStream
from hybrid_k2.config import ModelConfig
from hybrid_k2.experts import open_experts
from hybrid_k2.experts.base import ELSEWHERE
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.host.threads import virtual_nodes
from hybrid_k2.placement import parse_rules
from tests.generators import write_checkpoint
from tests.gpu.host_card import use_host_card
from tests.gpu.test_hot_experts import RULES, SIZES
from tests.gpu.test_int4_experts import ROUNDED_ERROR
from tests.models import loaded
from tests.unit.experts_common import float64_layer, load_random_experts, native_runtime, random_routing

HIDDEN, INNER, EXPERTS, TOP_K = 64, 96, 11, 3


@pytest.mark.parametrize("nodes", [1, 2])
def test_experts_of_all_nodes_arrive_and_are_added(device: torch.device, nodes: int) -> None:
    native_runtime()
    runtime = open_experts("exact", 2, nodes=virtual_nodes(2, nodes))
    layers = {i: runtime.make_layer(HIDDEN, INNER, EXPERTS, TOP_K) for i in (1, 2)}
    oracles = {i: float64_layer(HIDDEN, INNER, EXPERTS, TOP_K) for i in layers}
    for i, layer in layers.items():
        load_random_experts(layer, oracles[i])
    sources = {i: layer for i, layer in layers.items() if isinstance(layer, NativeExperts)}
    stream = CudaExpertStream(sources, layers[1].shape, device, 60.0)
    for tokens, count in ((1, 1), (23, PLACES + 2), (9, 3)):
        stream.begin()
        x, (ids, weights) = torch.randn(tokens, HIDDEN).bfloat16(), random_routing(tokens, EXPERTS, TOP_K)
        order = torch.randperm(EXPERTS)[:count].tolist()
        asked = {i: stream.ask(i, order) for i in layers}
        streamed = torch.isin(ids, torch.tensor(order, dtype=torch.int32))
        own = torch.where(streamed, ids, ELSEWHERE).to(device)
        for i, oracle in oracles.items():
            got = stream.compute(asked[i], x.to(device), own, weights.to(device)).cpu()
            parts = [
                oracle.forward(x, ids, torch.where(streamed & (torch.arange(TOP_K) == k), weights, 0.0))
                for k in range(TOP_K)
            ]
            size = torch.stack(parts).norm(dim=2).sum(0)
            expected = torch.stack(parts).sum(0)
            assert ((got - expected).norm(dim=1) <= ROUNDED_ERROR * size + 1e-12).all()
            assert not got[~streamed.any(1)].any()
    stream.close()
    runtime.close()


def test_a_model_that_streams_says_what_it_says_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "tiny", seed=9, **SIZES)
    use_host_card(monkeypatch)
    ids = torch.randint(0, ModelConfig.load(folder).vocab_size, (70,)).tolist()
    found = []
    for stream in ("off", "auto, copy_gbps: 10, read_gbps: 20, token_us: 0.1"):
        rules = RULES.replace("HOT", "") + f"prefill: {{stream: {stream}}}\n"
        with loaded(folder, parse_rules(rules)) as model:
            assert (model.model.split is not None) == (stream != "off")
            found.append(model.logits(ids).cpu())
    error = (found[1] - found[0]).norm(dim=1) / found[0].norm(dim=1)
    assert 0 < error.median() < 2 * ROUNDED_ERROR, "weights and intermediate of one layer are rounded to bf16"

"""The measurement of the experts: its figures belong together and its answers are checked."""

from __future__ import annotations

import json

import pytest
import torch

from hybrid_k2.bench import experts as bench
from hybrid_k2.bench.experts import BYTES_PER_32_WEIGHTS, measure_experts, memory_bytes
from hybrid_k2.experts import ExpertsShape
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.host.threads import virtual_nodes
from hybrid_k2.native import NATIVE_ERROR
from tests.unit.experts_common import usable_isas

pytestmark = pytest.mark.skipif(NATIVE_ERROR is not None, reason=f"no native extension: {NATIVE_ERROR}")

SHAPE = ExpertsShape(hidden_size=96, moe_intermediate_size=64, n_routed_experts=7, num_experts_per_tok=3)
EXPERT_BYTES = 3 * 96 * 64 * BYTES_PER_32_WEIGHTS // 32


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PROBE_SECONDS", 0.001)


def test_the_figures_of_a_result_belong_together() -> None:
    report = measure_experts(SHAPE, [1, 5], ["exact"], usable_isas()[0], virtual_nodes(2, 1), rounds=3)
    assert set(report.to_json()) == {"raw_read_gbps", "peak_gops", "tuning", "results"}
    assert json.loads(json.dumps(report.to_json()))["peak_gops"].keys() == {"exact"}
    assert min(report.raw_read_gbps, report.peak_gops["exact"]) > 0
    assert [r.tokens for r in report.results] == [1, 5]
    for r in report.results:
        seconds = r.ms / 1e3
        assert r.gbps == pytest.approx(r.distinct_experts * EXPERT_BYTES / seconds / 1e9)
        assert r.gops == pytest.approx(r.tokens * 3 * 6 * 96 * 64 / seconds / 1e9)
        assert 3 <= r.distinct_experts <= min(7, 3 * r.tokens)
        assert r.share_of_floor > 0
        assert 0 < r.error < 2e-4
        assert r.isa == usable_isas()[0]
        assert r.threads == 2
    assert report.table().count("\n") == 4


def test_a_wrong_answer_shows_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = NativeExperts.forward

    def slightly_wrong(self: NativeExperts, *arguments: torch.Tensor) -> torch.Tensor:
        return 1.01 * forward(self, *arguments)

    monkeypatch.setattr(NativeExperts, "forward", slightly_wrong)
    report = measure_experts(SHAPE, [2], ["exact"], usable_isas()[0], virtual_nodes(1, 1), rounds=1)
    assert report.results[0].error == pytest.approx(0.01, rel=0.1)


def test_one_token_meets_all_experts_in_turn() -> None:
    seen = [bench.RandomExperts(SHAPE, 1, seed=0)]
    ids = torch.cat([seen[0].route(1)[0] for _ in range(7)])
    assert torch.equal(ids.flatten().bincount(), torch.full((7,), 3))


def test_the_memory_of_a_full_layer_is_foreseen() -> None:
    full = ExpertsShape(7168, 2048, 384, 8)
    layer = 384 * 24_772_608
    assert layer < memory_bytes(full, 64) < layer + (3 << 30)

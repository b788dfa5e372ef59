"""The measurement of decode steps as graphs, on a host in the place of a card where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from hybrid_k2.accelerator.kernels import mla_decode
from hybrid_k2.bench import overlap as bench
from hybrid_k2.bench.overlap import measure_overlap
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import ConfigError
from hybrid_k2.native import NATIVE_ERROR
from tests.generators import write_checkpoint
from tests.gpu.host_card import HostCard, use_host_card

pytestmark = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 64, "qk_rope_head_dim": 32}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """The sizes of a tiny model in the place of a slice of K2.6: the interpreter is slow."""
    monkeypatch.setattr(mla_decode, "SMALL", replace(mla_decode.SMALL, splits=2))
    use_host_card(monkeypatch)
    tiny = ModelConfig.load(write_checkpoint(tmp_path, seed=1, **SIZES))
    monkeypatch.setattr(bench, "slice_config", lambda *arguments: tiny)
    return tiny


def test_steps_are_measured_as_graphs_and_launched(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, capture = [], HostCard.capture
    monkeypatch.setattr(HostCard, "capture", lambda self, op: recorded.append(op) or capture(self, op))
    report = measure_overlap("cuda", 2, layers=2, context=3, steps=1, graphs=True)
    assert report.step_graph_ms is not None
    assert report.step_graph_ms > 0
    assert f"{report.step_graph_ms:.2f} ms as a graph" in report.table()
    assert len(recorded) == (0 if torch.cuda.is_available() else 1)


def test_graphs_that_are_not_there_are_refused(config: ModelConfig) -> None:
    for device, sequences, got in (("cuda", 9, "9 sequences"), ("twin", 2, "a device or an installation that")):
        with pytest.raises(ConfigError, match=f"graphs: expected a GPU, triton and at most 8 sequences, got {got}"):
            measure_overlap(device, sequences, layers=2, context=3, steps=1, graphs=True)

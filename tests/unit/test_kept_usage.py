"""How often experts were used outlives the process that counted, in whatever way it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid_k2.engine import Engine, SamplingParams, kept_usage
from hybrid_k2.engine.service import Service
from hybrid_k2.engine.service_types import ServiceEvent, ServiceRequest
from hybrid_k2.experts.usage import LayerUsage, recall_usage
from hybrid_k2.native import NATIVE_ERROR
from tests.engines import generated
from tests.generators import write_checkpoint
from tests.unit.test_hot_experts import hot_rules
from tests.unit.test_schedule import BLOCKS

pytestmark = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")

CHOICES = 4  # of each token


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", seed=6, **BLOCKS)


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine that writes its counts after each step."""
    monkeypatch.setattr(kept_usage, "EVERY_S", 0.0)
    with Engine.load(folder, hot_rules()) as engine:
        yield engine


def remembered(engine: Engine) -> list[int]:
    """How many tokens were counted in each layer, by what is on the disk."""
    if (writer := engine._usage._writer) is not None:
        writer.join()
    counts = recall_usage(engine.folder, engine.config.moe_layers, 16)
    return [sum(each) // CHOICES for each in counts.values()]


def test_counts_are_on_the_disk_while_requests_run(engine: Engine) -> None:
    assert remembered(engine) == []
    generated(engine, [3, 77, 5, 8], max_tokens=1)
    assert remembered(engine) == [4, 4, 4]
    generated(engine, [9] * 8, max_tokens=1)  # one step: of several, those that come while it writes are not waited for
    assert remembered(engine) == [12, 12, 12]


def test_a_service_writes_them_too(engine: Engine) -> None:
    events: list[ServiceEvent] = []
    with Service(engine) as service:
        request = ServiceRequest(prompt=[3, 77, 5, 8], params=SamplingParams(max_tokens=1, ignore_eos=True), key="a")
        service.submit(request, events.append)
        assert service.drain(60)
        assert remembered(engine) == [4, 4, 4]


def test_they_are_not_written_before_it_is_due(folder: Path) -> None:
    with Engine.load(folder, hot_rules()) as engine:
        generated(engine, [3, 77, 5, 8], max_tokens=2)
        assert remembered(engine) == []
    assert remembered(engine) == [5, 5, 5]


def test_a_slow_disk_holds_no_step_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free, writings = threading.Event(), []

    def slow(checkpoint: Path, counts: object) -> None:
        writings.append(counts)
        assert free.wait(60)

    monkeypatch.setattr(kept_usage, "remember_usage", slow)
    generated(engine, [3, 77, 5, 8], max_tokens=5)
    assert len(writings) == 1
    free.set()
    engine.close()
    assert len(writings) == 2


def test_a_card_that_failed_does_not_keep_the_engine_from_closing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: LayerUsage) -> list[int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = Engine.load(folder, hot_rules())
    monkeypatch.setattr(LayerUsage, "counts", fail)
    engine.close()
    assert engine.loaded.text._closed
    assert "not remembered: CUDA error" in caplog.text


def test_an_interrupt_while_they_are_written_leaves_nothing_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(checkpoint: Path, counts: object) -> None:
        raise KeyboardInterrupt

    engine = Engine.load(folder, hot_rules())
    monkeypatch.setattr(kept_usage, "remember_usage", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert engine.loaded.text._closed

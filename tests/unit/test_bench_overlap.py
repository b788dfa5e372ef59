"""The measurement of the overlap: its figures belong together, and docs/overlap.md knows its options and fields."""

from __future__ import annotations

import json
import re
import resource
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from hybrid_k2.bench import overlap as bench
from hybrid_k2.bench.overlap import OverlapReport, check_tokens, measure_overlap
from hybrid_k2.bench.slice import slice_config, widths, write_slice
from hybrid_k2.cli.bench import app
from hybrid_k2.errors import ConfigError, HardwareError, MemoryBudgetError
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import Machine
from tests.conftest import REPO

DOC = (REPO / "docs" / "overlap.md").read_text(encoding="utf-8")
SMALL = {"scale": 8, "layers": 3, "experts": 8, "context": 20, "steps": 2}


@pytest.mark.skipif(NATIVE_ERROR is not None, reason=f"no native extension: {NATIVE_ERROR}")
def test_the_figures_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "HANDOFFS", 5)
    trace = tmp_path / "trace.json"
    report = measure_overlap("twin", 3, **SMALL, trace_to=trace)  # type: ignore[arg-type]
    assert json.loads(json.dumps(report.to_json()))["device"] == "twin"
    assert (report.sequences, report.moe_layers, report.steps, report.accelerator) == (3, 2, 2, "twin")
    assert report.accelerator_threads >= 1
    assert report.overlap_share is not None
    assert 0 < report.overlap_share <= 1
    assert report.handoff_us is not None
    assert report.handoff_us > 0
    assert report.layer_ms == pytest.approx(report.step_ms / 3)
    assert report.step_graph_ms is None
    assert "as a graph" not in report.table()
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    computed = [event for event in events if event["cat"] == "experts"]
    halves = {(event["args"]["layer"], event["args"]["half"]) for event in computed}
    assert halves == {(1, 0), (1, 1), (2, 0), (2, 1)}
    assert len(computed) == 2 * 2 * report.steps
    assert sum(event["dur"] for event in computed) / 1e3 == pytest.approx(report.layer_experts_ms * 2 * report.steps)
    worked = sum(event["dur"] for event in events if event["cat"] == "accelerator" and event["args"].get("layer"))
    waited = sum(event["dur"] for event in events if event["cat"] == "waits")
    assert (worked - waited) / 1e3 == pytest.approx(report.layer_accelerator_ms * 2 * report.steps, rel=1e-3)
    assert f"{report.overlap_share:.0%}" in report.table()


def test_the_cache_holds_whole_pages_of_each_sequence_and_no_more_than_the_model_allows() -> None:
    assert check_tokens(1, 1, 1) == 64
    assert check_tokens(3, 61, 1) == 3 * 64
    assert check_tokens(3, 62, 1) == 3 * 128
    assert check_tokens(1, 200000, 10000) == -(-210002 // 64) * 64
    assert check_tokens(1024, 250, 4) == check_tokens(2, 131000, 70) == 262144
    for many in ((1025, 250, 4), (1024, 250, 5), (2, 131000, 71), (2, 200000, 1)):
        with pytest.raises(ConfigError, match="bench overlap: expected at most 262144 cached tokens, got "):
            check_tokens(*many)


def test_a_slice_that_does_not_fit_is_told_in_the_options_words(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Machine(1 << 24, 1 << 24, 2)
    monkeypatch.setattr(Machine, "probe", classmethod(lambda cls: small))
    with pytest.raises(MemoryBudgetError, match=r"^bench overlap: host: expected a plan of at most ") as caught:
        measure_overlap("twin", 2)
    assert "fewer --layers" in (caught.value.hint or "")


def test_a_full_disk_is_named_with_what_was_to_be_written(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # as a disk that is full after a MiB
    try:
        with pytest.raises(
            HardwareError, match=r"model\.safetensors: expected to write \d+\.\d\d MiB, got: "
        ) as caught:
            write_slice(tmp_path, slice_config(widths(8), 2, 8, "test"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "TMPDIR" in (caught.value.hint or "")


def test_no_folder_for_temporary_files_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(HardwareError, match="expected a folder for temporary files, got: No such file"):
        measure_overlap("twin", 1, **SMALL)  # type: ignore[arg-type]


@pytest.mark.skipif(NATIVE_ERROR is not None, reason=f"no native extension: {NATIVE_ERROR}")
def test_hit_rates_of_hot_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "HANDOFFS", 5)
    report = measure_overlap("twin", 2, **SMALL | {"experts": 10}, hot=4)  # type: ignore[arg-type]
    assert report.hot_experts == 4
    assert report.hot_hit_rates.keys() == {1, 2}
    # A token takes 8 of 10 experts, at least 2 and at most 4 of which are hot; each of 2 sequences in 2 steps twice.
    for rate in report.hot_hit_rates.values():
        assert 2 / 8 <= rate <= 4 / 8
        assert (rate * 2 * 2 * 2 * 8) % 1 == 0
    assert "hits by layer 1: " in report.table()
    assert json.loads(json.dumps(report.to_json()))["hot_hit_rates"].keys() == {"1", "2"}
    assert measure_overlap("twin", 1, **SMALL).hot_hit_rates == {}  # type: ignore[arg-type]


@pytest.mark.skipif(NATIVE_ERROR is not None, reason=f"no native extension: {NATIVE_ERROR}")
def test_experts_are_deferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "HANDOFFS", 5)
    report = measure_overlap("twin", 1, **SMALL, deferred=2, trace_to=tmp_path / "t.json")  # type: ignore[arg-type]
    assert report.deferred == 2
    assert "deferred         2 experts of each token" in report.table()
    names = [event["name"] for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]]
    assert names.count("defer") == names.count("collect") == report.steps * (report.moe_layers - 1) > 0


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if Machine.probe().gpus:
        pytest.skip("this machine has a GPU")
    with pytest.raises(HardwareError, match="bench overlap: expected a CUDA device, got none") as caught:
        measure_overlap("cuda", 2)
    assert caught.value.hint is not None
    assert "--device twin" in caught.value.hint


def test_the_page_knows_every_option_and_field() -> None:
    command = get_command(app).commands["overlap"]  # type: ignore[attr-defined]
    options = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    assert set(re.findall(r"(?<=`)--[a-z-]+", DOC)) == options - {"--help"}
    assert not {field.name for field in fields(OverlapReport) if f"`{field.name}`" not in DOC}

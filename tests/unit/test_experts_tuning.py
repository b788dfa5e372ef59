"""The tuning: found by trying, remembered per machine, harmless whatever is in the file, and never a bit different."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from hybrid_k2.errors import MemoryBudgetError
from hybrid_k2.experts import remembered
from hybrid_k2.experts.cpu import NativeRuntime
from hybrid_k2.experts.tuning import Tuning, machine_key, remembered_tuning
from hybrid_k2.model import loader
from tests.generators import write_checkpoint
from tests.models import loaded
from tests.unit.experts_common import load_random_experts, native_runtime, random_routing, usable_isas

FOUND = Tuning(streams=2, prefetch_one=4096, prefetch_many=0, tiles_from=4, token_cost=0.5)


class Tuner:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tuning:
        self.calls += 1
        return FOUND


def test_a_tuning_is_measured_once_per_machine(tmp_path: Path) -> None:
    tune = Tuner()
    for key in ("CPU A, avx2", "CPU A, avx2", "CPU B, avx2", "CPU A, avx2"):
        assert remembered_tuning(key, tune, tmp_path / "new") == FOUND
    assert tune.calls == 2
    assert len(list((tmp_path / "new").iterdir())) == 2  # nothing is left behind


def damaged(key: str = "k", **changes: object) -> bytes:
    return json.dumps({"key": key, "tuning": asdict(FOUND) | changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b"{}",
        b'{"key": "k"}',
        b'{"key": "k", "tuning": 3}',
        b"[" * 100000,
        damaged("other"),
        damaged(streams=3),
        damaged(streams=True),
        damaged(prefetch_one=-64),
        damaged(prefetch_many=1e9),
        damaged(prefetch_many=[]),
        damaged(tiles_from=0),
        damaged(token_cost=0.0),
        damaged(token_cost=float("nan")),
        damaged(token_cost="1"),
        damaged(surplus=1),
    ],
)
def test_a_damaged_file_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tuning-k.json").write_bytes(content)
    tune = Tuner()
    assert remembered_tuning("k", tune, tmp_path) == FOUND
    assert remembered_tuning("k", tune, tmp_path) == FOUND
    assert tune.calls == 1


def test_a_folder_that_cannot_be_written_costs_the_memory_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tune = Tuner()
    for _ in range(2):
        assert remembered_tuning("k", tune, tmp_path / "file" / "below") == FOUND
    assert tune.calls == 2
    (tmp_path / "tuning-k.json").mkdir()  # a folder where the file should be
    assert remembered_tuning("k", tune, tmp_path) == FOUND
    assert list(tmp_path.glob("tmp*")) == []


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remembered.cache_folder() == tmp_path / "hybrid-k2"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed to be: as if it were not set
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert remembered.cache_folder() == tmp_path / "home" / ".cache" / "hybrid-k2"


def test_large_experts_are_tuned_at_the_start_and_small_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native_runtime().close()
    tuned: list[NativeRuntime] = []

    def note(runtime: NativeRuntime) -> None:
        tuned.append(runtime)

    monkeypatch.setattr(NativeRuntime, "tune", note)
    folder = write_checkpoint(tmp_path)
    with loaded(folder, "host"):
        assert not tuned
    monkeypatch.setattr(loader, "LARGE_BYTES", 1)
    with loaded(folder, "host"):
        assert len(tuned) == 1


def test_a_start_uses_what_an_earlier_one_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native_runtime().close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    isa = usable_isas()[0]
    for numerics in ("exact", "fast"):
        runtime = NativeRuntime(usable_isas(numerics)[0], 1, numerics)
        runtime.tune()
        runtime.close()
    files = sorted((tmp_path / "hybrid-k2").iterdir())
    assert len(files) == 2
    key = machine_key(isa, "exact", 1, 1)
    (file,) = (file for file in files if json.loads(file.read_text())["key"] == key)
    file.write_text(json.dumps({"key": key, "tuning": asdict(FOUND)}))
    runtime = NativeRuntime(isa, 1)
    assert runtime.tuning != FOUND
    runtime.tune()
    assert runtime.tuning == FOUND
    runtime.close()


def test_without_the_memory_to_measure_the_kernels_keep_their_tuning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime = native_runtime()
    assert isinstance(runtime, NativeRuntime)

    def refuse(threads: int) -> int:
        raise MemoryBudgetError("no room")

    monkeypatch.setattr("hybrid_k2.experts.cpu.probe_bytes", refuse)
    before = runtime.tuning
    runtime.tune()
    assert runtime.tuning == before
    assert not list(tmp_path.rglob("*.json"))
    runtime.close()


@pytest.mark.parametrize("numerics", ["exact", "fast", "bf16"])
def test_no_tuning_changes_a_bit(numerics: str) -> None:
    native_runtime().close()
    for isa in usable_isas(numerics):
        runtime = NativeRuntime(isa, 3, numerics)
        layer = runtime.make_layer(160, 192, 4, 2)
        load_random_experts(layer)
        hidden, (ids, weights) = torch.randn(9, 160), random_routing(9, 4, 2)
        expected = layer.forward(hidden, ids, weights)
        for streams in (1, 2, 4):
            for ahead in (0, 4096):
                for token_cost in (0.01, 0.7, 100.0):
                    chosen = Tuning(streams, ahead, 4096 - ahead, 1 + ahead % 5, token_cost)
                    runtime.tuning = chosen
                    assert replace(runtime.tuning, token_cost=token_cost) == chosen  # the cost is fp32 there
                    assert torch.equal(layer.forward(hidden, ids, weights), expected)
                    assert torch.equal(layer.forward(hidden[:1], ids[:1], weights[:1]), expected[:1])
        runtime.close()


def setting(**changes: object) -> Callable[[], Tuning]:
    return lambda: Tuning(**(asdict(FOUND) | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (setting(streams=3), "streams: expected 1, 2 or 4, got 3"),
        (setting(prefetch_many=-1), r"prefetch_many: expected 0\.\.65536, got -1"),
        (setting(token_cost=0.0), "token_cost: expected a number above 0"),
    ],
)
def test_a_tuning_that_no_kernel_has_is_refused(make: Callable[[], Tuning], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_native_runtime_checks_what_it_is_given() -> None:
    runtime = native_runtime()
    for wrong in (
        (3, 0, 0, 4, 1.0),
        (1, -1, 0, 4, 1.0),
        (1, 0, 1 << 17, 4, 1.0),
        (1, 0, 0, 66, 1.0),
        (1, 0, 0, 4, float("nan")),
    ):
        with pytest.raises(ValueError, match="expected"):
            runtime.native.tuning = wrong
    with pytest.raises(ValueError, match="bytes: expected at least"):
        runtime.native.measure_tuning(0.001, 1 << 20)
    runtime.close()

"""The fingerprint of an engine: the same for the same engine, another one where latents may have other bits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_k2.engine import Engine
from hybrid_k2.engine import fingerprint as module
from hybrid_k2.engine.fingerprint import fingerprint
from hybrid_k2.engine.loading import LoadedModel
from hybrid_k2.placement import Machine
from hybrid_k2.placement.machine import Gpu
from tests.engines import host_rules, random_engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with random_engine(tmp_path / "model", packed=True) as one:
        yield one


def test_the_same_engine_has_the_same_fingerprint(engine: Engine) -> None:
    first = fingerprint(engine.loaded)
    with Engine.load(engine.folder, engine.plan.rules) as again:
        assert fingerprint(again.loaded) == first


def test_the_place_of_the_checkpoint_does_not_matter(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.folder, tmp_path / "moved", copy_function=shutil.copy2)  # with the times of change
    with Engine.load(tmp_path / "moved", engine.plan.rules) as moved:
        assert fingerprint(moved.loaded) == fingerprint(engine.loaded)


def touch_weights(folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(0, 0))


def grow_weights(folder: Path) -> None:
    times = (folder / "model.safetensors").stat()
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    os.utime(folder / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))


def change_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rope_theta": 50000.0', '"rope_theta": 50001.0'))


@pytest.mark.parametrize("change", [touch_weights, grow_weights, change_config])
def test_another_checkpoint_has_another_fingerprint(engine: Engine, change: Callable[[Path], None]) -> None:
    before = fingerprint(engine.loaded)
    change(engine.folder)
    assert fingerprint(engine.loaded) != before


@pytest.mark.parametrize("rules", [{"dtype": "bf16"}, {"numerics": "exact"}, {"chunk_tokens": 8}])
def test_other_rules_have_another_fingerprint(engine: Engine, rules: dict[str, Any]) -> None:
    with Engine.load(engine.folder, host_rules(**rules)) as other:
        assert fingerprint(other.loaded) != fingerprint(engine.loaded)


def with_plan(loaded: LoadedModel, **changes: Any) -> LoadedModel:
    return replace(loaded, plan=replace(loaded.plan, **changes))


def with_machine(loaded: LoadedModel, **changes: Any) -> LoadedModel:
    machine: Machine = replace(loaded.plan.machine, **changes)
    return with_plan(loaded, machine=machine)


def with_cache(loaded: LoadedModel, **changes: Any) -> LoadedModel:
    return with_plan(loaded, kv_cache=replace(loaded.plan.kv_cache, **changes))


def test_what_decides_bits_is_in_it(engine: Engine) -> None:
    loaded = engine.loaded
    rows = tuple(replace(row, dtype="int8") if row.what == "attention" else row for row in loaded.plan.rows)
    assert rows != loaded.plan.rows
    others = [
        with_plan(loaded, rows=rows),
        with_plan(loaded, numerics="fast"),
        with_plan(loaded, activation_dtype="bf16"),
        with_plan(loaded, accelerator="twin"),
        with_plan(loaded, accelerator="twin", overlap="ping_pong"),
        with_plan(loaded, accelerator="twin", deferred=2),
        with_plan(loaded, accelerator="cuda:0"),
        with_plan(loaded, accelerator="cuda:0", graphs=True),
        with_plan(loaded, accelerator="cuda:0", stream="auto"),
        with_plan(loaded, nodes=loaded.plan.nodes * 2),
        with_machine(loaded, gpus=(Gpu(0, "a card", 1 << 34),)),
        with_machine(loaded, gpus=(Gpu(0, "a card", 1 << 34, capability=(9, 0)),)),
        with_cache(loaded, dtype="bf16"),
        with_cache(loaded, page_tokens=32),
    ]
    prints = {fingerprint(one) for one in (loaded, *others)}
    assert len(prints) == len(others) + 1


def test_what_does_not_is_not(engine: Engine) -> None:
    """More memory, or a larger cache, is no reason to forget everything."""
    loaded = engine.loaded
    more = loaded.plan.machine.host_memory_bytes + 1
    for other in (with_machine(loaded, host_memory_bytes=more), with_cache(loaded, tokens=6400), with_plan(loaded)):
        assert fingerprint(other) == fingerprint(loaded)


@pytest.mark.parametrize("fact", ["version", "torch", "threads", "capability", "cpu", "triton", "kernels", "isa"])
def test_other_software_or_another_cpu_has_another_fingerprint(
    engine: Engine, fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(engine.loaded)
    if fact == "version":
        monkeypatch.setattr(module, "__version__", "0.0.0")
    elif fact == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99")
    elif fact == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    elif fact == "capability":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NONE")
    elif fact == "cpu":
        monkeypatch.setattr(module, "cpu_model", lambda: "another")
    elif fact == "triton":
        monkeypatch.setattr(module, "_version", lambda package: "99")
    elif fact == "kernels":
        (tmp_path / "built.so").write_bytes(b"other kernels")
        monkeypatch.setattr(module, "native", SimpleNamespace(__file__=str(tmp_path / "built.so")))
    else:
        monkeypatch.setattr(engine.loaded.text.experts_runtime, "name", "native avx2, exact (A16)")
    assert fingerprint(engine.loaded) != before

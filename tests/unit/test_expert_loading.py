"""Experts from a checkpoint into a backend: the same weights on every path, and failures that name tensor and file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from hybrid_k2.checkpoint import Checkpoint, PackedWeight, StoredExpert, read_expert
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import CheckpointError
from hybrid_k2.experts import ExpertsBackend
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.experts.reference import ReferenceRuntime
from hybrid_k2.model.expert_loading import load_experts, warn_of_small_pages
from tests.generators import write_checkpoint
from tests.unit.experts_common import native_layer, native_runtime

LAYER = 2
EXPERT_5 = "model.layers.2.mlp.experts.5."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sharded"), seed=3, shards=5, model_type="kimi_k2")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Checkpoint, ModelConfig]]:
    """A checkpoint of one's own, to be damaged."""
    folder = write_checkpoint(tmp_path, seed=4, shards=2, model_type="kimi_k2")
    with Checkpoint.open(folder) as checkpoint:
        yield checkpoint, ModelConfig.load(folder)


def sizes(config: ModelConfig) -> tuple[int, int, int, int]:
    return (
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
    )


def load(backend: ExpertsBackend, checkpoint: Checkpoint, config: ModelConfig, threads: int = 2) -> list[int]:
    counted: list[int] = []
    load_experts(
        backend,
        checkpoint,
        config,
        LAYER,
        range(config.n_routed_experts),
        dtype="int4",
        threads=threads,
        count=counted.append,
    )
    return counted


@pytest.mark.parametrize("threads", [1, 3])
def test_the_native_reader_loads_what_the_checkpoint_holds(folder: Path, threads: int) -> None:
    config = ModelConfig.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        layer, expected = (native_layer(*sizes(config)) for _ in range(2))
        counted = load(layer, checkpoint, config, threads)
        for expert in range(config.n_routed_experts):
            weights = read_expert(checkpoint, config, LAYER, expert)
            expected.load_expert(expert, weights)
            assert layer.checksum(expert) == expected.checksum(expert)
            got = layer.read_expert(expert)
            for name in ("gate", "up", "down"):
                stored, loaded = getattr(weights, name), getattr(got, name)
                assert isinstance(stored, PackedWeight)
                assert torch.equal(stored.packed, loaded.packed)
                assert torch.equal(stored.scale.view(torch.int16), loaded.scale.view(torch.int16))
        of_layer = [info.nbytes for name, info in checkpoint.infos.items() if f"layers.{LAYER}.mlp.experts." in name]
        assert sum(counted) == sum(of_layer)
        assert len(counted) == config.n_routed_experts


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_backends_compute_the_same_from_files(folder: Path, backend: str) -> None:
    config = ModelConfig.load(folder)
    runtime = native_runtime() if backend == "native" else ReferenceRuntime()
    with Checkpoint.open(folder) as checkpoint:
        from_files, from_tensors = runtime.make_layer(*sizes(config)), runtime.make_layer(*sizes(config))
        load(from_files, checkpoint, config)
        for expert in range(config.n_routed_experts):
            from_tensors.load_expert(expert, read_expert(checkpoint, config, LAYER, expert))
    hidden = torch.randn(5, config.hidden_size)
    ids = torch.stack([torch.randperm(config.n_routed_experts)[: config.num_experts_per_tok] for _ in range(5)])
    routing = ids.to(torch.int32), torch.rand(5, config.num_experts_per_tok)
    assert torch.equal(from_files.forward(hidden, *routing), from_tensors.forward(hidden, *routing))


def cut(path: Path, offset: int) -> None:
    os.truncate(path, offset + 1)


def stamp(path: Path, _: int) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def grow(path: Path, _: int) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"expected \d+ bytes, got [01] |got \d+ bytes instead of"),
        (stamp, "expected a file that does not change while it is loaded, got one that was changed"),
        (grow, r"expected a file that does not change while it is loaded, got \d+ bytes instead of"),
        (lambda path, _: path.unlink(), "expected a file that stays until it is loaded: No such file"),
    ],
    ids=["shrinks", "is written to", "grows", "is removed"],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_file_that_changes_while_it_is_loaded(
    opened: tuple[Checkpoint, ModelConfig], change: Callable[[Path, int], object], message: str, backend: str
) -> None:
    checkpoint, config = opened
    info = checkpoint.info(f"{EXPERT_5}up_proj.weight_packed")
    layer = native_layer(*sizes(config)) if backend == "native" else ReferenceRuntime().make_layer(*sizes(config))
    change(info.file, info.offset)
    with pytest.raises(CheckpointError, match=message) as error:
        load(layer, checkpoint, config)
    assert error.value.message.startswith(f"model.layers.{LAYER}.mlp.experts.")
    assert error.value.message.endswith(f"(in {info.file})")


def test_a_change_in_the_middle_is_noticed(opened: tuple[Checkpoint, ModelConfig]) -> None:
    checkpoint, config = opened
    file = checkpoint.info(f"{EXPERT_5}up_proj.weight_packed").file
    seen: list[int] = []

    def count(nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) == 2:
            stamp(file, 0)

    layer = native_layer(*sizes(config))

    def load_twice() -> None:  # the reader may be done with all experts when the second one is counted
        for _ in range(2):
            load_experts(
                layer, checkpoint, config, LAYER, range(config.n_routed_experts), dtype="int4", threads=1, count=count
            )

    with pytest.raises(CheckpointError, match=f"one that was changed.*{file.name}"):
        load_twice()
    assert len(seen) >= 2


def test_a_closed_checkpoint_is_refused(opened: tuple[Checkpoint, ModelConfig]) -> None:
    checkpoint, config = opened
    checkpoint.close()
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj.*expected an open checkpoint, got a closed one"):
        load(native_layer(*sizes(config)), checkpoint, config)


def test_a_matrix_of_another_shape_is_refused(opened: tuple[Checkpoint, ModelConfig]) -> None:
    checkpoint, config = opened
    hidden, inner, experts, top_k = sizes(config)
    layer = native_layer(hidden, inner * 2, experts, top_k)
    with pytest.raises(ValueError, match=r"experts\.5\.gate_proj\.weight_packed: expected \d+ bytes, got \d+"):
        layer.load_stored(5, StoredExpert(checkpoint, config, LAYER, 5))
    assert isinstance(layer, NativeExperts)


def test_progress_says_the_sum_of_what_was_read(folder: Path) -> None:
    config = ModelConfig.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        counted = load(native_layer(*sizes(config)), checkpoint, config)
        each = [StoredExpert(checkpoint, config, LAYER, expert).nbytes for expert in range(config.n_routed_experts)]
    assert list(accumulate(counted)) == list(accumulate(each))


@pytest.mark.parametrize(("share", "warned"), [(None, False), (1.0, False), (0.95, False), (0.5, True), (0.0, True)])
def test_memory_on_small_pages_is_said_with_its_cost(
    share: float | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = cast(ExpertsBackend, SimpleNamespace(huge_page_share=share))
    warn_of_small_pages(backend)
    assert bool(caplog.records) == warned
    if share is not None and warned:
        assert f"{100 * share:.0f} % of the experts' memory" in caplog.text
        assert "quarter slower" in caplog.text

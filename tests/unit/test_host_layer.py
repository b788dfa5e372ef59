"""Whole layers in one native call: the bits of their parts one by one, and the same errors."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor

from hybrid_k2.accelerator import Trace
from hybrid_k2.dense import HostMatrix
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.usage import LayerUsage
from hybrid_k2.host.threads import NodeThreads
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.host_layer import FEW_ROWS, HostLayer
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.moe import Moe
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import Rules, shipped_rules
from tests.generators import write_checkpoint
from tests.models import Loaded, loaded, part_by_part
from tests.unit.experts_common import usable_isas
from tests.unit.test_schedule import random_steps, run, same

pytestmark = pytest.mark.skipif(
    NATIVE_ERROR is not None or usable_isas()[0] == "portable", reason="needs the native attention kernels"
)

WHOLE_BLOCKS = {"q_lora_rank": 64}  # as the other matrices have them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whole"), seed=5, **WHOLE_BLOCKS)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that int8 can have throughout: the latents' matrix is not padded."""
    return write_checkpoint(tmp_path_factory.mktemp("blocks"), seed=6, qk_rope_head_dim=32, **WHOLE_BLOCKS)


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[Loaded]:
    with loaded(folder, "host") as model:
        yield model


def filled_cache(model: Loaded) -> LatentCache:
    cache = model.cache()
    for layer in cache.layers:
        layer.fill_(1.0)
    return cache


def decode(model: Loaded, cache: LatentCache | None = None) -> Tensor:
    """Compute one token of each of two sequences."""
    chunks = [Chunk([3], 40, [0]), Chunk([9], 70, [5, 2])]
    return model.model.forward(Batch.build(chunks), cache or filled_cache(model))


def rules(dtype: str, numerics: str, cache: str) -> Rules:
    """Rules that differ from the shipped ones in these."""
    made = shipped_rules("host")
    place = tuple(p if p.what in ("embedding", "routed_experts") else replace(p, dtype=dtype) for p in made.place)
    return replace(made, place=place, numerics=numerics, kv_cache=replace(made.kv_cache, dtype=cache))


@pytest.mark.parametrize(
    ("dtype", "numerics", "cache", "nodes"),
    [
        ("bf16", "exact", "bf16", 1),
        ("int8", "exact", "bf16", 2),
        ("bf16", "fast", "fp32", 2),
        ("int8", "fast", "bf16", 1),
        ("bf16", "bf16", "bf16", 2),
        ("int8", "bf16", "fp32", 1),
    ],
)
def test_whole_layers_give_the_bits_of_their_parts(
    folder: Path, blocks: Path, dtype: str, numerics: str, cache: str, nodes: int
) -> None:
    """Ragged batches of prompts and decode steps, over pages in any order, some of them too large to be joined."""
    folder = folder if dtype == "bf16" else blocks
    with (
        loaded(folder, rules(dtype, numerics, cache), nodes=(NodeThreads(1, 0),) * nodes) as whole,
        loaded(folder, rules(dtype, numerics, cache), nodes=(NodeThreads(1, 0),) * nodes) as parts,
    ):
        assert all(layer.whole is not None for layer in whole.model.layers)
        part_by_part(parts.model)
        for _ in range(2):
            steps = random_steps(random.Random(), whole.config.vocab_size)
            assert same(run(whole, steps), run(parts, steps))
            assert same(run(whole, steps, alone=True), run(parts, steps))


def test_the_latents_are_those_of_the_parts(folder: Path, host: Loaded) -> None:
    caches = []
    with loaded(folder, "host") as parts:
        part_by_part(parts.model)
        for model in (host, parts):
            cache = model.cache()
            for layer in cache.layers:
                layer.fill_(7.0)
            model.logits([5, 6, 7, 8, 9], [3, 1], cache)
            caches.append(cache)
    for layer, other in zip(*(cache.layers for cache in caches), strict=True):
        assert (layer[0, :5] != 7).any(dim=1).all()
        assert torch.equal(layer, other)


@pytest.mark.parametrize("sizes", [{"q_lora_rank": 48}, {"moe_intermediate_size": 48, "packed": False}])
def test_layers_that_are_not_native_throughout_stay_apart(sizes: dict[str, int], tmp_path: Path) -> None:
    with loaded(write_checkpoint(tmp_path, seed=1, **sizes), "host") as model:
        moe = [layer for layer in model.model.layers if isinstance(layer.mlp, Moe)]
        assert [layer.whole for layer in moe] == [None] * len(moe)
        assert model.logits([1, 2, 3], [2]).isfinite().all()


@pytest.mark.parametrize("name", ["reference", "twin"])
def test_other_rules_stay_apart(folder: Path, name: str) -> None:
    with loaded(folder, name) as model:
        assert [layer.whole for layer in model.model.layers] == [None] * 3


def test_as_many_rows_as_are_few_are_joined(host: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    run = HostLayer.run
    monkeypatch.setattr(HostLayer, "run", lambda self, x, *rest: taken.append(len(x)) or run(self, x, *rest))
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        host.model.forward(Batch.build([Chunk([0] * rows, 0, [0, 1])]), host.cache())
    assert taken == [1] * 3 + [FEW_ROWS] * 3


def test_a_trace_gets_the_parts(host: Loaded) -> None:
    expected = decode(host)
    host.model.trace = trace = Trace()
    try:
        assert torch.equal(decode(host), expected)
    finally:
        host.model.trace = None
    names = {event.label.name for event in trace.events}
    assert {"front", "post", "shared", "take", "experts"} <= names
    assert "layer" not in names


def test_choices_are_counted(folder: Path) -> None:
    counted = []
    for apart in (False, True):
        with loaded(folder, "host") as model:
            layers = []
            for layer in model.model.layers:
                mlp = layer.mlp
                if isinstance(mlp, Moe):
                    mlp = replace(mlp, usage=LayerUsage([0] * 16, torch.device("cpu")))
                layers.append(replace(layer, mlp=mlp))
            model.model.layers = layers
            if apart:
                part_by_part(model.model)
            model.logits([5, 6, 7, 8], [1, 2])
            counted.append({index: usage.counts() for index, usage in model.model.usage.items()})
    assert counted[0] == counted[1]
    assert [sum(counts) for counts in counted[0].values()] == [4 * 4, 4 * 4]


def test_an_error_names_the_layer_and_the_next_step_says_so_too(folder: Path) -> None:
    with loaded(folder, "host") as model:
        mlp = model.model.layers[2].mlp
        assert isinstance(mlp, Moe)
        assert isinstance(model.model.layers[2].whole, HostLayer)
        mlp.experts.close()
        for _ in range(2):
            with pytest.raises(EngineError, match=r"layer 2: experts: expected an open layer, got a closed one"):
                decode(model)


def test_stopped_threads_are_an_error_that_names_the_layer(folder: Path) -> None:
    with loaded(folder, "host") as model:
        model.model.experts_runtime.close()
        with pytest.raises(EngineError, match="layer 0: expert threads: expected them running"):
            decode(model)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_an_interrupt_ends_a_step_within_a_layer(folder: Path) -> None:
    """The threads are busy with something else, so that the first product of the first layer has to wait."""
    with loaded(folder, "host") as model:
        expected, cache = decode(model), filled_cache(model)
        large = HostMatrix(model.model.experts_runtime.native, 4096, 4096, "bf16")
        touched: list[bool] = []

        def interrupt(number: int, frame: FrameType | None) -> None:
            touched.append(bool((cache.layers[0] != 1).any()))
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        busy = threading.Thread(target=large, args=(torch.zeros(4096, 4096),))
        try:
            busy.start()
            time.sleep(0.1)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                decode(model, cache)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            busy.join()
        assert touched == [False]
        assert torch.equal(decode(model), expected)


def test_wrong_shapes_are_refused(host: Loaded) -> None:
    layer, cache = host.model.layers[1], host.cache()
    batch = Batch.build([Chunk([1, 2], 0, [0])])
    rotation = host.model._rope.rotation(batch.positions)
    assert layer.whole is not None
    for x, message in (
        (torch.zeros(2, 32), r"x: expected shape \[2, 64\], got \[2, 32\]"),
        (torch.zeros(3, 64), r"cos: expected shape \[3, 4\], got \[2, 4\]"),
        (torch.zeros(2, 64).double(), r"x: expected contiguous float32, got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.whole.run(x, batch, cache.layers[1], rotation)
    with pytest.raises(ValueError, match=r"page_table: expected pages below 1, got 5"):
        layer.whole.run(torch.zeros(2, 64), Batch.build([Chunk([1, 2], 0, [5])]), cache.layers[1][:1], rotation)

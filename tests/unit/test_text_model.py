from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from hybrid_k2.accelerator import DirectHandoff
from hybrid_k2.errors import EngineError, RequestError
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.router import Router
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import shipped_rules
from tests.generators import read_tensors, write_checkpoint
from tests.models import Loaded, loaded, part_by_part
from tests.reference import text as oracle

# A sum of n fp32 products errs by about sqrt(n) * 2^-24 of its size. Up to the logits 37 of them follow each other
# (three layers of 8 in the attention and 4 in the MLP, then lm_head), n is at most 128, and logits are at most 5.
CLOSE = {"rtol": 0.0, "atol": 37 * 128**0.5 * 2**-24 * 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[Loaded]:
    with loaded(folder) as model:
        yield model


@pytest.mark.parametrize("model_type", ["kimi_k25", "kimi_k2"])
@pytest.mark.parametrize("packed", [True, False])
def test_equals_the_oracle(model_type: str, packed: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path, seed=11, model_type=model_type, packed=packed, first_k_dense_replace=2, n_shared_experts=2
    )
    with loaded(folder) as tiny:
        ids = oracle.random_ids(70, tiny.config, seed=1)
        expected = oracle.logits(ids, oracle.plain_weights(read_tensors(folder), tiny.config), tiny.config)
        got = tiny.logits(ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_chunked_prefill_equals_whole_prefill(tiny: Loaded, seed: int) -> None:
    chance = random.Random(seed)
    ids = oracle.random_ids(500, tiny.config, seed)
    chunks = [chance.choice([1, chance.randint(2, 200)]) for _ in range(12)]
    torch.testing.assert_close(tiny.logits(ids, chunks), tiny.logits(ids), **CLOSE)


def test_cached_decode_equals_recomputation(tiny: Loaded) -> None:
    ids = oracle.random_ids(96, tiny.config, seed=7)
    decoded = tiny.logits(ids, [32, *[1] * 64])
    for length in (1, 33, 34, 64, 65, 96):
        torch.testing.assert_close(decoded[length - 1], tiny.logits(ids[:length])[-1], **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_batch_of_sequences_equals_each_alone(tiny: Loaded, seed: int) -> None:
    chance = random.Random(seed)
    cache = tiny.cache()
    prompts = [oracle.random_ids(chance.randint(1, 150), tiny.config, 10 * seed + i) for i in range(5)]
    pages = [chance.sample(range(200), cache.pages_for(len(ids))) for ids in prompts]
    pages = [[page * 5 + i for page in group] for i, group in enumerate(pages)]  # disjoint and out of order
    got: list[list[torch.Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    while active := [i for i, ids in enumerate(prompts) if done[i] < len(ids)]:
        chunks = []
        for i in active:
            size = chance.choice([1, chance.randint(1, 100)])
            chunks.append(Chunk(prompts[i][done[i] : done[i] + size], done[i], pages[i]))
            done[i] += len(chunks[-1].token_ids)
        logits = tiny.model.forward(Batch.build(chunks, all_logits=True), cache)
        parts = logits.split([len(chunk.token_ids) for chunk in chunks])
        for i, part in zip(active, parts, strict=True):
            got[i].append(part)
    for ids, parts in zip(prompts, got, strict=True):
        torch.testing.assert_close(torch.cat(parts), tiny.logits(ids), **CLOSE)


def test_returns_the_wanted_rows_only(tiny: Loaded) -> None:
    ids = oracle.random_ids(600, tiny.config, seed=4)
    every = tiny.logits(ids)
    cache = tiny.cache()
    last = tiny.model.forward(Batch.build([Chunk(ids, 0, cache.pool.allocate(10))]), cache)
    none = tiny.model.forward(Batch.build([Chunk(ids, 0, cache.pool.allocate(10), logits=False)]), cache)
    assert every.shape == (600, tiny.config.vocab_size)
    assert none.shape == (0, tiny.config.vocab_size)
    torch.testing.assert_close(last, every[-1:], **CLOSE)


def test_logits_are_the_callers_to_change(tiny: Loaded) -> None:
    logits = tiny.logits([1, 2, 3])
    logits[0] -= 1
    assert not logits.is_inference()
    assert not logits.requires_grad


def test_refuses_tokens_outside_the_vocabulary(tiny: Loaded) -> None:
    cache = tiny.cache()
    for ids in ([3, tiny.config.vocab_size], [-1]):
        with pytest.raises(RequestError, match=r"token ids: expected 0\.\.511, got"):
            tiny.model.forward(Batch.build([Chunk(ids, 0, [0])]), cache)


def test_refuses_too_few_pages_before_it_computes(tiny: Loaded) -> None:
    cache = tiny.cache()
    cache.layers[0].fill_(7.0)
    with pytest.raises(EngineError, match="expected pages for 65 tokens"):
        tiny.model.forward(Batch.build([Chunk([1], 0, [0]), Chunk([1], 64, [1])]), cache)
    assert (cache.layers[0] == 7.0).all()


def test_a_closed_model_says_so(folder: Path) -> None:
    with loaded(folder) as tiny:
        cache = tiny.cache()
        tiny.model.close()
        with pytest.raises(EngineError, match="model: expected an open one"):
            tiny.model.forward(Batch.build([Chunk([1], 0, [0])]), cache)
        tiny.model.close()


def native_threads() -> set[str]:
    """Return the threads of the extension, as their names in /proc say."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if (task / "comm").read_text().startswith("k2-expert"):
                found.add(task.name)
    return found


@pytest.mark.parametrize("part", ["handoff", "accelerator"])
@pytest.mark.parametrize("rules", ["host", "twin"])
def test_closing_that_is_interrupted_releases_everything(
    rules: str, part: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = native_threads()  # what earlier tests have left may end meanwhile
    with loaded(folder, rules) as tiny:
        assert tiny.logits([1, 2, 3]).isfinite().all()
        owner = getattr(tiny.model, part)
        real, experts = owner.close, [layer.mlp.experts for layer in tiny.model.layers if isinstance(layer.mlp, Moe)]
        started = native_threads() - before
        assert NATIVE_ERROR or started

        def interrupted() -> None:
            real()
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny.model.close()
        shape = experts[0].shape
        hidden, ids = torch.zeros(1, shape.hidden_size), torch.arange(shape.num_experts_per_tok).int()[None]
        for backend in experts:
            with pytest.raises(EngineError, match="closed"):
                backend.forward(hidden, ids, torch.ones(ids.shape))
        assert tiny.model.layers == []
    assert not started & native_threads()


@pytest.mark.parametrize("top", [4, 16])
def test_native_experts_stay_close_to_the_reference(top: int, tmp_path: Path, record_property) -> None:  # type: ignore[no-untyped-def]
    """Both plans keep the dense groups in fp32, so that only the experts differ."""
    folder = write_checkpoint(tmp_path, seed=8, num_experts_per_tok=top)
    exact_rules = dataclasses.replace(shipped_rules("reference"), numerics="exact")
    with loaded(folder) as reference, loaded(folder, exact_rules) as exact:
        assert exact.plan.numerics == "exact"
        ids = oracle.random_ids(200, reference.config, seed=5)
        expected, got = reference.logits(ids), exact.logits(ids)
        name = exact.model.experts_runtime.name
    error = (got - expected).abs().amax(1)  # [T]
    record_property("median_logit_error", error.median().item())
    record_property("max_logit_error", error.max().item())
    print(f"{name}, {top} of 16 experts: logit error median {error.median():.1e}, max {error.max():.1e}")
    # 16-bit activations err by some 1e-4 of an expert's output; the logits have a spread of 1. Where experts are
    # chosen, a token with two that almost tie may choose the other one; where all are, none can.
    assert 0 < error.median() < 1e-3
    assert top < 16 or error.max() < 2e-3


def test_bf16_weights_on_the_host_cost_no_accuracy(folder: Path, tiny: Loaded) -> None:
    """The checkpoint is in bf16: with fp32 activations the host computes what it would with fp32 weights."""
    ids = oracle.random_ids(120, tiny.config, seed=6)
    with loaded(folder, "host", numerics="reference", activation_dtype="fp32", kv_cache=tiny.plan.kv_cache) as host:
        assert host.model.layers[0].attention.o.dtype == torch.bfloat16
        got = host.logits(ids, [50, 1, 1])
    torch.testing.assert_close(got, tiny.logits(ids), **CLOSE)


def test_bf16_activations_stay_close(folder: Path, tiny: Loaded) -> None:
    ids = oracle.random_ids(120, tiny.config, seed=6)
    expected = tiny.logits(ids)
    with loaded(folder, "host", activation_dtype="bf16") as host:
        got = host.logits(ids, [50])
    # bf16 keeps 8 bits: a few percent after three layers, and single tokens may choose another expert.
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 0.04
    assert (got.argmax(1) == expected.argmax(1)).float().mean() > 0.8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_gpu_rules_stay_close_to_the_reference(folder: Path, tiny: Loaded) -> None:
    """Dense groups and cache on the GPU in bf16, embedding and routed experts on the host."""
    ids = oracle.random_ids(200, tiny.config, seed=6)
    expected = tiny.logits(ids)
    with loaded(folder, "gpu") as gpu:
        assert gpu.model.layers[1].device.type == gpu.cache().layers[1].device.type == "cuda"
        got = gpu.logits(ids, [90, 1, 1]).cpu()
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 0.04  # bf16 keeps 8 bits
    assert (got.argmax(1) == expected.argmax(1)).float().mean() > 0.8


@pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")
def test_the_threads_are_asked_for_router_and_shared_expert_at_once_where_nobody_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(router: Router, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the router's products by themselves")

    with loaded(folder, "host") as host:
        part_by_part(host.model)
        with monkeypatch.context() as patch:
            patch.setattr(Router, "_logits", refuse)
            joined = host.logits([5, 6, 7, 8], [3])
        monkeypatch.setattr(DirectHandoff, "concurrent", True)
        assert torch.equal(host.logits([5, 6, 7, 8], [3]), joined)

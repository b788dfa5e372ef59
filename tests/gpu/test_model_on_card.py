"""A model whose plan has a GPU, through the GPU's hand-off; on a host in the place of a card where there is none."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from hybrid_k2.accelerator import Handoff, InlineAccelerator
from hybrid_k2.accelerator.handoff_cuda import CudaHandoff
from hybrid_k2.accelerator.kernels import mla_decode
from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.usage import LayerUsage
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.router import Routing
from hybrid_k2.model.self_check import self_check
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import Rules, parse_rules
from tests.generators import write_checkpoint
from tests.gpu.host_card import HostCard, use_host_card
from tests.models import Loaded, loaded

pytestmark = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")

SIZES = {"num_hidden_layers": 3, "q_lora_rank": 64, "qk_rope_head_dim": 32}
RULES = """\
version: 1
devices: {gpu: cuda:0}
place:
  - {what: embedding, on: host}
  - {what: attention, on: gpu, dtype: fp32}
  - {what: dense_mlp, on: gpu, dtype: fp32}
  - {what: shared_experts, on: gpu, dtype: fp32}
  - {what: routed_experts, on: host}
  - {what: lm_head, on: gpu, dtype: fp32}
kv_cache: {dtype: fp32, tokens: 576}
prefill: {chunk_tokens: 64}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("card"), seed=11, **SIZES)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("two"), seed=12, **SIZES | {"num_hidden_layers": 2})


def on_host(rules: Rules) -> Rules:
    """The same dtypes, all on the host."""
    return replace(rules, place=tuple(replace(rule, on="host") for rule in rules.place), overlap="off")


@contextmanager
def both(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = RULES) -> Iterator[tuple[Loaded, Loaded]]:
    """The model on a card, and all of it on the host."""
    rules = parse_rules(text)
    with loaded(folder, on_host(rules)) as host:
        use_host_card(monkeypatch)
        with loaded(folder, rules) as card:
            yield card, host


def run(model: Loaded, steps: Sequence[Sequence[list[int]]]) -> Tensor:
    """Return the logits of every token of three sequences, step after step."""
    cache, done, parts = model.cache(), [0, 0, 0], []
    for step in steps:
        chunks = [Chunk(ids, done[i], [3 * i + 2, 3 * i, 3 * i + 1]) for i, ids in enumerate(step)]
        parts.append(model.model.forward(Batch.build(chunks, all_logits=True), cache).cpu())
        done = [before + len(ids) for before, ids in zip(done, step, strict=True)]
    return torch.cat(parts)


def random_steps(vocab: int) -> list[list[list[int]]]:
    """A prompt for each of three sequences, then decode steps; pages are not consecutive."""
    sizes = [[random.randint(1, 9) for _ in range(3)], [1, random.randint(2, 4), 1], [1, 1, 1]]
    return [[[random.randrange(vocab) for _ in range(n)] for n in step] for step in sizes]


def test_a_plan_with_a_gpu_runs_through_its_hand_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are fp32 on both: what differs is the order of sums, 2^-24 of them in each of some 100 operations."""
    with both(folder, monkeypatch) as (card, host):
        assert isinstance(card.model.handoff, CudaHandoff)
        assert card.plan.overlap == "ping_pong"
        steps = random_steps(card.config.vocab_size)
        found, expected = run(card, steps), run(host, steps)
        assert expected.std() > 0.1
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
        if isinstance(card.model.accelerator, HostCard):
            assert card.model.accelerator.steps == 3


def test_a_batch_beyond_the_room_is_refused_and_the_next_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with both(folder, monkeypatch) as (card, _):
        assert card.model.handoff.room == card.plan.batch_tokens == 64
        with pytest.raises(EngineError, match="batch: expected at most 64 tokens, got 65"):
            card.model.forward(Batch.build([Chunk([1] * 65, 0, [0, 1])]), card.cache())
        assert run(card, [[[1], [2], [3]]]).isfinite().all()


def test_what_is_posted_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with both(folder, monkeypatch) as (card, _):
        handoff, device = card.model.handoff, card.model.accelerator.device
        hidden, ids, weights = (
            torch.zeros(2, *size, dtype=dtype, device=device)
            for size, dtype in (((64,), torch.bfloat16), ((4,), torch.int32), ((4,), torch.float32))
        )
        for wrong, error in (
            ((hidden.double(), ids, weights), r"hidden: expected bfloat16 or float32, got torch\.float64"),
            ((hidden, ids.long(), weights), r"ids: expected int32, got torch\.int64"),
            ((hidden, ids, weights.bfloat16()), r"weights: expected float32, got torch\.bfloat16"),
            ((hidden[:, :32], ids, weights), r"hidden: expected shape \[T, 64\], got \[2, 32\]"),
            ((hidden, ids[:1], weights), r"ids: expected shape \[2, 4\], got \[1, 4\]"),
            ((hidden.to("meta"), ids, weights), r"hidden: expected .*, got one on meta"),
            ((hidden.repeat(40, 1), ids.repeat(40, 1), weights.repeat(40, 1)), "at most 64 tokens, got 80"),
        ):
            with pytest.raises((TypeError, ValueError), match=error):
                handoff.post(0, 1, *wrong)


def test_a_failure_of_the_experts_names_the_layer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with both(folder, monkeypatch) as (card, host):
        whole = card.model.layers[2]
        moe = whole.mlp
        assert isinstance(moe, Moe)

        def route(x: Tensor) -> Routing:
            routing = moe.router(x)
            return replace(routing, ids=routing.ids + 100)

        card.model.layers[2] = replace(whole, mlp=replace(moe, router=route, usage=None))  # type: ignore[arg-type]
        for _ in range(2):
            with pytest.raises(EngineError, match=r"layer 2: .*expected experts 0\.\.15"):
                run(card, [[[1], [2], [3]]])
        card.model.layers[2] = whole
        steps = random_steps(card.config.vocab_size)
        assert torch.allclose(run(card, steps), run(host, steps), atol=1e-2)


class NoNumbers(Handoff):
    """Take what is posted, give as many rows back, all of them without numbers."""

    def __init__(self) -> None:
        self.shapes: dict[int, torch.Size] = {}
        self.taken = 0

    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        assert hidden.is_meta
        assert ids.is_meta
        assert weights.is_meta
        self.shapes[slot] = hidden.shape

    def take(self, slot: int, layer: int) -> Tensor:
        self.taken += 1
        return torch.empty(self.shapes.pop(slot), device="meta")

    def reset(self) -> None:
        return

    def close(self) -> None:
        return


def without_numbers(part: Any) -> Any:
    """The part, its tensors on a device that has shapes alone."""
    if isinstance(part, Tensor):
        return part.to("meta")
    if isinstance(part, LayerUsage):
        return LayerUsage(part.counts(), torch.device("meta"))
    if is_dataclass(part) and not isinstance(part, type):
        plain = {field.name: without_numbers(getattr(part, field.name)) for field in fields(part)}
        return replace(part, **plain | ({"kernel": False} if "kernel" in plain else {}))
    return part


def test_operations_ask_the_gpu_for_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without numbers, whatever asks for one raises: the step is launched without waiting."""
    with both(folder, monkeypatch) as (card, _):
        model = card.model
        model.layers = [without_numbers(layer) for layer in model.layers]
        model.lm_head, model.final_norm = without_numbers(model.lm_head), without_numbers(model.final_norm)
        model.accelerator.close()
        model.accelerator = InlineAccelerator()
        model.handoff.close()
        model.handoff = handoff = NoNumbers()
        cache = card.cache()
        cache.layers = [layer.to("meta") for layer in cache.layers]
        with pytest.raises(NotImplementedError, match="meta"):
            model.layers[0].attention.o.cpu()  # type: ignore[union-attr]
        for ping_pong in (False, True):
            model.ping_pong = ping_pong
            logits = model.forward(
                Batch.build([Chunk([1], 70, [4, 2]), Chunk([1] * 30, 3, [1]), Chunk([2], 5, [5])]), cache
            )
            assert (logits.is_meta, len(logits)) == (True, 3)
        assert handoff.taken == 2 * (1 + 2)


# With Triton's kernels in the layers


# Another dtype for each group; the kernels of attention read a cache in bf16.
WITH_KERNELS = (
    RULES.replace("attention, on: gpu, dtype: fp32", "attention, on: gpu, dtype: bf16")
    .replace("dense_mlp, on: gpu, dtype: fp32", "dense_mlp, on: gpu, dtype: int8")
    .replace("shared_experts, on: gpu, dtype: fp32", "shared_experts, on: gpu, dtype: fp8")
    .replace("lm_head, on: gpu, dtype: fp32", "lm_head, on: gpu, dtype: bf16")
    .replace("kv_cache: {dtype: fp32", "kv_cache: {dtype: bf16")
)


def test_layers_with_kernels_agree_with_the_reference(
    device: torch.device, two_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bounds of the check before a model serves: what rounding does to each part."""
    monkeypatch.setattr("hybrid_k2.model.self_check.CONTEXT", 7)  # rows are slow in the interpreter
    monkeypatch.setattr(mla_decode, "SMALL", replace(mla_decode.SMALL, splits=2))
    use_host_card(monkeypatch)
    with loaded(two_layers, parse_rules(WITH_KERNELS)) as card:
        attention = card.model.layers[0].attention
        assert attention.gpu is not None
        assert attention.q_a_norm.kernel
        with Checkpoint.open(two_layers) as checkpoint:
            done = self_check(card.model, checkpoint, card.config, card.plan)
        assert {found.part for found in done.findings if found.device == "cuda:0"} == {
            "attention", "dense_mlp", "router", "shared_experts", "lm_head",
        }  # fmt: skip
        assert max(found.placed.share for found in done.findings) < 0.8


def test_experts_on_the_card_pass_the_check(two_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hot ones, with few rows exactly and with many rounded to bf16, and streamed ones."""
    monkeypatch.setattr("hybrid_k2.model.self_check.CONTEXT", 2)  # rows are slow in the interpreter
    monkeypatch.setattr("hybrid_k2.model.self_check.MORE_EXPERTS", 0)
    use_host_card(monkeypatch)
    text = RULES.replace("  - {what: lm_head", "  - {what: routed_experts, on: gpu, hottest: 3}\n  - {what: lm_head")
    text = text.replace("chunk_tokens", "stream: auto, copy_gbps: 10, read_gbps: 20, token_us: 1, chunk_tokens")
    with loaded(two_layers, parse_rules(text)) as card, Checkpoint.open(two_layers) as checkpoint:
        done = self_check(card.model, checkpoint, card.config, card.plan)
    found = {each.part: each.placed for each in done.findings if "experts" in each.part and each.device == "cuda:0"}
    assert found.keys() == {"shared_experts", "hot experts", "hot experts in a prompt", "streamed experts"}
    assert max(each.share for each in found.values()) < 0.8
    assert found["hot experts"].error < 1e-4 < found["hot experts in a prompt"].error

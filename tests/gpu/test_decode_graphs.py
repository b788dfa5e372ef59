"""Decode steps as graphs: recorded by a stand-in that computes nothing then, and launches the recording afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton", reason="triton is not installed")

from hybrid_k2.accelerator import handoff_cuda
from hybrid_k2.accelerator.handoff_cuda import CudaHandoff
from hybrid_k2.accelerator.host_calls import HostCalls
from hybrid_k2.accelerator.kernels import mla_decode
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.decode_graphs import Form
from hybrid_k2.model.decode_inputs import DecodeInputs
from hybrid_k2.model.moe import Moe
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import parse_rules
from hybrid_k2.placement.overheads import GRAPH_ROWS
from hybrid_k2.protocol import image_token
from tests.generators import write_checkpoint
from tests.gpu.host_card import HostCard, use_host_card
from tests.gpu.recorder import Recorder
from tests.models import Loaded, loaded

pytestmark = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 64, "qk_rope_head_dim": 32}
RULES = """\
version: 1
devices: {gpu: cuda:0}
place:
  - {what: embedding, on: host}
  - {what: attention, on: gpu, dtype: bf16}
  - {what: dense_mlp, on: gpu, dtype: bf16}
  - {what: shared_experts, on: gpu, dtype: bf16}
  - {what: routed_experts, on: host}
  - {what: lm_head, on: gpu, dtype: bf16}
kv_cache: {dtype: bf16, tokens: 1536}
prefill: {chunk_tokens: 64}
"""
NARROW = RULES.replace("dense_mlp, on: gpu, dtype: bf16", "dense_mlp, on: gpu, dtype: int8")
HOT = NARROW.replace("  - {what: lm_head", "  - {what: routed_experts, on: gpu, hottest: 2}\n  - {what: lm_head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("graphs"), seed=13, **SIZES)


@contextmanager
def on_card(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = RULES) -> Iterator[Loaded]:
    monkeypatch.setattr(mla_decode, "SMALL", replace(mla_decode.SMALL, splits=2))  # rows are slow in the interpreter
    use_host_card(monkeypatch)
    with loaded(folder, parse_rules(text)) as card:
        yield card


class Sequences:
    """Eight sequences behind random latents, on scattered pages that nobody else has."""

    def __init__(self, card: Loaded) -> None:
        self.card = card
        self.cache = card.cache()
        for layer in self.cache.layers:
            layer.normal_()
        pages = torch.randperm(self.cache.pool.pages).tolist()
        self.cached = [random.choice([0, 1, random.randrange(100), 63, 64]) for _ in range(8)]
        self.pages = [pages[3 * i : 3 * i + 3] for i in range(8)]
        self.written: set[tuple[int, ...]] = set()  # page and place in it

    def copy(self) -> Sequences:
        other = object.__new__(Sequences)
        other.card, other.cache, other.pages = self.card, self.card.cache(), self.pages
        other.cached, other.written = list(self.cached), set()
        for mine, its in zip(self.cache.layers, other.cache.layers, strict=True):
            its.copy_(mine)
        return other

    def batch(self, who: Sequence[int], ids: Sequence[int]) -> Batch:
        return Batch.build([Chunk([token], self.cached[i], self.pages[i]) for i, token in zip(who, ids, strict=True)])

    def step(self, who: Sequence[int], ids: Sequence[int]) -> Tensor:
        logits = self.card.model.forward(self.batch(who, ids), self.cache)
        for i in who:
            page, place = divmod(self.cached[i], self.cache.page_tokens)
            self.written.add((self.pages[i][page], place))
            self.cached[i] += 1
        return logits


def random_steps(card: Loaded, counts: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Who takes part in each step, and with which tokens."""
    vocab = card.config.vocab_size
    return [(random.sample(range(8), n), [random.randrange(vocab) for _ in range(n)]) for n in counts]


def host_card(card: Loaded) -> HostCard:
    accelerator = card.model.accelerator
    if not isinstance(accelerator, HostCard):
        pytest.skip("the stand-in is for machines without a GPU")
    return accelerator


def test_a_graph_gives_the_bits_of_what_it_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_card(folder, monkeypatch, HOT) as card:
        check_bits(card, monkeypatch, [2, 1, 2, 1, 2, 1], both_ways=2 + 1)
        assert [recording.launches > 30 for recording in host_card(card).recordings] == [True, True]


def test_a_recorded_step_may_have_rows_of_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt can be cut into single tokens. An image is read as the text whose embedding its rows are."""
    with on_card(folder, monkeypatch) as card:
        sequences = Sequences(card)
        for step in random_steps(card, [1] * 2):  # launched; recorded and compared
            sequences.step(*step)
        assert len(host_card(card).recordings) == 1
        ((who,), ids), *_ = random_steps(card, [1])
        chunk = Chunk([image_token(7, 0)], sequences.cached[who], sequences.pages[who])
        image = Batch.build([chunk], features={7: card.model.embedding[ids]})
        text = sequences.batch([who], ids)
        assert torch.equal(*(card.model.forward(batch, sequences.cache) for batch in (image, text)))


@pytest.mark.gpu
def test_a_graph_on_a_card_gives_the_bits_of_what_it_recorded(
    card: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in (HOT, HOT + "overlap: off\n"):
        with loaded(folder, parse_rules(text)) as model:
            check_bits(model, monkeypatch, [2, 1, 2, 1, 2, 1, 8, 3, 5, 4, 6, 3, 8, 1, 7, 4, 2], both_ways=2 + 1 + 5 + 4)


def check_bits(card: Loaded, monkeypatch: pytest.MonkeyPatch, counts: Sequence[int], both_ways: int) -> None:
    """Run the same steps on two caches, as graphs and operation by operation; a hot expert changes in between.

    both_ways: rows of the second step of each size, which is launched twice and counted twice.
    """
    with monkeypatch.context() as patch:
        moe = card.model.layers[1].mlp
        assert isinstance(moe, Moe)
        graphs = Sequences(card)
        launched = graphs.copy()
        steps = random_steps(card, counts)
        old, new = min(hot := experts_of(moe)), random.choice(sorted(set(range(16)) - hot))
        found, counted = [], []
        kind = type(card.model.accelerator)
        for sequences, capture in ((graphs, kind.capture), (launched, lambda self, op: op)):
            patch.setattr(kind, "capture", capture)
            for number, step in enumerate(steps):
                if number == len(steps) - 2:
                    exchange(moe, old, new)
                found.append(sequences.step(*step))
            exchange(moe, new, old)
            counted.append(moe.usage.counts() if moe.usage is not None else [])
        assert card.model.graphs is not None
        assert card.model.graphs.fits(graphs.batch(*steps[0])), "none was refused"
        half = len(steps)
        assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(graphs.cache.layers, launched.cache.layers, strict=True))
        assert [2 * count for count in counted[0]] == counted[1]
        assert sum(counted[0]) == (sum(counts) + both_ways) * card.config.num_experts_per_tok


def experts_of(moe: Moe) -> set[int]:
    assert moe.hot is not None
    return set(moe.hot.experts)


def exchange(moe: Moe, old: int, new: int) -> None:
    """Let an expert of the host take the place of a hot one, which the host gets."""
    assert moe.hot is not None
    assert isinstance(moe.experts, NativeExperts)
    leaves = moe.hot.copy(old)
    moe.hot.bring(new, moe.experts.copy_expert(new))
    with torch.inference_mode():
        moe.hot.exchange(old, new)
    moe.experts.replace_expert(new, old, leaves)


def test_rows_that_fill_a_step_up_touch_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a size that there is a graph for have the bits of a model without graphs, others differ by rounding."""
    with on_card(folder, monkeypatch, RULES + "overlap: off\n") as card:
        graphs = Sequences(card)
        without = graphs.copy()
        before = [layer.clone() for layer in graphs.cache.layers]
        steps = random_steps(card, [4, 4, 3])
        found = [graphs.step(*step) for step in steps]
        handoff = card.model.handoff
        assert isinstance(handoff, CudaHandoff)
        ids = torch.from_numpy(handoff._mailbox.areas(0)[3])[:4]
        assert (ids[:3] >= 0).all()
        assert ids[3].tolist() == [-1] * card.config.num_experts_per_tok
        card.model.graphs = None
        for number, (step, got) in enumerate(zip(steps, found, strict=True)):
            expected = without.step(*step)
            if number < 2:
                assert torch.equal(got, expected)
            assert (got - expected).abs().max() < 0.05 * expected.abs().max()
        for layer, old in zip(graphs.cache.layers, before, strict=True):
            assert set(map(tuple, (layer != old).any(-1).nonzero().tolist())) == graphs.written


def test_a_cache_has_graphs_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_card(folder, monkeypatch) as card:
        first = Sequences(card)
        step = random_steps(card, [1])[0]
        found = []
        for caches in (1, 2):
            sequences = first.copy()
            found.append([sequences.step(*step) for _ in range(2)])
            assert len(host_card(card).recordings) == caches
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_cannot_be_recorded_is_launched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with on_card(folder, monkeypatch) as card:
        sequences = Sequences(card)
        expected = sequences.copy()
        steps = random_steps(card, [1, 1, 1])
        take = CudaHandoff.take

        def take_and_look(self: CudaHandoff, slot: int, layer: int) -> Tensor:
            result = take(self, slot, layer)
            assert result.sum().item() != 0
            return result

        found = [expected.step(*step) for step in steps]
        assert len(host_card(card).recordings) == 1
        monkeypatch.setattr(CudaHandoff, "take", take_and_look)
        assert all(torch.equal(sequences.step(*step), want) for step, want in zip(steps, found, strict=True))
        assert card.model.graphs is not None
        assert not card.model.graphs.fits(sequences.batch([0], [0]))
        (record,) = (record for record in caplog.records if record.levelname == "WARNING")
        assert "operation by operation: they cannot be recorded: _local_scalar_dense" in record.getMessage()


def test_memory_that_does_not_stay_is_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests would see an input of a step that a graph reads where it was when it was recorded."""
    with on_card(folder, monkeypatch) as card:
        host_card(card)
        fill = DecodeInputs.fill

        def fill_elsewhere(self: DecodeInputs, *arguments: Any) -> None:
            self._x = self._x.clone()
            fill(self, *arguments)

        monkeypatch.setattr(DecodeInputs, "fill", fill_elsewhere)
        sequences, (step,) = Sequences(card), random_steps(card, [1])
        sequences.step(*step)
        with pytest.raises(AssertionError, match=r"a graph reads memory that was given back: .* \[1, 64\]"):
            sequences.step(*step)


def test_a_graph_that_computes_something_else_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with on_card(folder, monkeypatch) as card:
        take, calls = CudaHandoff.take, []

        def take_more(self: CudaHandoff, slot: int, layer: int) -> Tensor:
            calls.append(layer)
            return take(self, slot, layer) + len(calls)

        monkeypatch.setattr(CudaHandoff, "take", take_more)
        sequences, graphs = Sequences(card), card.model.graphs
        assert graphs is not None
        steps = random_steps(card, [1, 1, 1])
        for number, step in enumerate(steps):
            assert graphs.fits(sequences.batch(*step))
            sequences.step(*step)
            assert len(host_card(card).recordings) == (number > 0)
        assert not graphs.fits(sequences.batch(*steps[0]))
        assert "operation by operation: a recorded one computed something else" in caplog.text


def test_a_graph_whose_experts_fail_names_the_layer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_card(folder, monkeypatch) as card:
        sequences, graphs = Sequences(card), card.model.graphs
        assert graphs is not None
        for step in random_steps(card, [1, 1, 1]):
            sequences.step(*step)
        labels: list[str] = []
        enqueue = card.model.accelerator.enqueue
        monkeypatch.setattr(
            card.model.accelerator, "enqueue", lambda op, label: labels.append(str(label)) or enqueue(op, label)
        )
        card.model.experts_runtime.close()
        with pytest.raises(EngineError, match=r"^layer 1: "):
            sequences.step([0], [1])
        assert labels == ["embed", "graph", "logits"]
        with pytest.raises(EngineError, match=r"^layer 1: "):
            sequences.step([0], [1])
        assert labels[3:6] == ["reset", "embed", "start, half 0"], "begun anew: operation by operation"


# Which batches, and which models


def test_prompts_and_many_sequences_are_launched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_card(folder, monkeypatch) as card:
        graphs = card.model.graphs
        assert graphs is not None
        single, prompt = Chunk([1], 5, [0]), Chunk([1, 2], 5, [0])
        for chunks, fits in (([single], True), ([single] * 8, True), ([single] * 9, False), ([single, prompt], False)):
            assert graphs.fits(Batch.build(chunks)) is fits


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("kv_cache: {", "graphs: off\nkv_cache: {"), "the plan has none"),
        (("cache: {dtype: bf16", "cache: {dtype: fp32"), "the plan has none"),
        (("shared_experts, on: gpu", "shared_experts, on: host"), "the plan has none"),
        (("devices: {gpu: cuda:0}", "devices: {gpu: twin}"), "the plan has none"),
    ],
)
def test_why_a_model_has_no_graphs(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: tuple[str, str],
    reason: str,
) -> None:
    assert change[0] in RULES
    with caplog.at_level("DEBUG", "hybrid_k2"), on_card(folder, monkeypatch, RULES.replace(*change)) as card:
        assert card.model.graphs is None
    assert f"operation by operation: {reason}" in caplog.text


def test_a_hand_off_by_host_functions_has_no_graphs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handoff_cuda, "_slot_calls", lambda mailbox: object.__new__(HostCalls))
    with caplog.at_level("DEBUG", "hybrid_k2"), on_card(folder, monkeypatch) as card:
        assert card.model.graphs is None
    assert "the hand-off to the experts is no kernel" in caplog.text


@given(st.integers(1, GRAPH_ROWS[-1]), st.booleans())
def test_rows_go_evenly_to_the_halves(count: int, two_halves: bool) -> None:
    form = Form.of(count, two_halves=two_halves)
    assert form.size // 2 < count <= form.size
    assert len(form.halves) == (2 if two_halves and count > 1 else 1)
    moves = form.moves(count)
    own, here = ([row for move in moves for row in range(move[i].start, move[i].stop)] for i in range(2))
    assert own == list(range(count))
    assert sorted(set(here)) == here
    sizes = [move.stop - move.start for _, move in moves]
    assert max(sizes) - min(sizes) <= 1
    for (_, move), half in zip(moves, form.halves, strict=True):
        assert half.start == move.start < move.stop <= half.stop


# The stand-in itself


def record(op: Callable[[], object]) -> Callable[[], None]:
    def launch() -> None:
        op()

    return Recorder().record(launch)


def test_a_recording_computes_nothing_and_its_launches_everything() -> None:
    x, weight, out = torch.randn(4, 16), torch.randn(8, 16), torch.zeros(4, 8)

    def op() -> None:
        y = functional.linear(x, weight)
        out.copy_(y.float() * torch.rsqrt(y.square().mean(-1, keepdim=True)))

    launch = record(op)
    assert not out.any()
    for _ in range(2):
        x.normal_()
        launch()
        expected = functional.linear(x, weight)
        assert torch.equal(out, expected * torch.rsqrt(expected.square().mean(-1, keepdim=True)))


def test_a_recording_keeps_numbers_and_forgets_what_it_left_behind() -> None:
    total, numbers = torch.zeros(1), [5.0]
    launch = record(lambda: total.add_(numbers[0]))
    numbers[0] = 7.0
    launch()
    launch()
    assert total.item() == 10
    out = torch.zeros(2)
    record(lambda: out.copy_(torch.empty(2)))()
    assert out.isnan().all()


@pytest.mark.parametrize(
    "op",
    [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: torch.tensor([1.0]) + x],
    ids=["item", "bool", "mask", "constant"],
)
def test_what_waits_for_the_device_cannot_be_recorded(op: Callable[[Tensor], object]) -> None:
    x = torch.randn(4)
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing"):
        record(lambda: op(x))


def test_a_recording_knows_that_memory_was_given_back() -> None:
    out = torch.zeros(4)
    gone = [torch.ones(4)]
    launch = record(lambda: out.copy_(gone[0]))
    gone.clear()
    with pytest.raises(AssertionError, match=r"memory that was given back: torch\.float32 \[4\]"):
        launch()

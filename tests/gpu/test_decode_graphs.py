"""Decode steps as graphs: recorded by a stand-in that computes nothing then, and launches the recording afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from hybrid_k2.accelerator.kernels import mla_decode
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import parse_rules
from tests.generators import write_checkpoint
from tests.gpu.host_card import HostCard, use_host_card
from tests.gpu.recorder import Recorder
from tests.models import Loaded, loaded

pytestmark = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")

SIZES = {"num_hidden_layers": 2, "q_lora_rank": 64, "qk_rope_head_dim": 32}
RULES = """\
version: 1
devices: {gpu: cuda:0}
place:
  - {what: embedding, on: host}
  - {what: attention, on: gpu, dtype: bf16}
  - {what: dense_mlp, on: gpu, dtype: int8}
  - {what: shared_experts, on: gpu, dtype: bf16}
  - {what: routed_experts, on: host}
  - {what: lm_head, on: gpu, dtype: bf16}
kv_cache: {dtype: bf16, tokens: 1536}
prefill: {chunk_tokens: 64}
"""
HOT = RULES.replace("  - {what: lm_head", "  - {what: routed_experts, on: gpu, hottest: 5}\n  - {what: lm_head")
WITHOUT_HALVES = RULES + "overlap: off\n"


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
        self.rows = [layer.clone() for layer in self.cache.layers]

    def copy(self) -> Sequences:
        other = object.__new__(Sequences)
        other.card, other.cache, other.pages = self.card, self.card.cache(), self.pages
        other.cached = list(self.cached)
        for mine, its in zip(self.cache.layers, other.cache.layers, strict=True):
            its.copy_(mine)
        return other

    def batch(self, who: Sequence[int], ids: Sequence[int]) -> Batch:
        return Batch.build([Chunk([token], self.cached[i], self.pages[i]) for i, token in zip(who, ids, strict=True)])

    def step(self, who: Sequence[int], ids: Sequence[int]) -> Tensor:
        logits = self.card.model.forward(self.batch(who, ids), self.cache)
        for i in who:
            self.cached[i] += 1
        return logits


def random_steps(card: Loaded, counts: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Who takes part in each step, and with which tokens."""
    vocab = card.config.vocab_size
    return [(random.sample(range(8), n), [random.randrange(vocab) for _ in range(n)]) for n in counts]


def host_card(card: Loaded) -> HostCard:
    accelerator = card.model.accelerator
    assert isinstance(accelerator, HostCard)
    return accelerator


@pytest.mark.parametrize("text", [RULES, WITHOUT_HALVES, HOT], ids=["two halves", "one", "hot experts"])
def test_a_graph_gives_the_bits_of_what_it_recorded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The same steps on two caches: as graphs, and each launched operation by operation."""
    with on_card(folder, monkeypatch, text) as card:
        graphs = Sequences(card)
        launched = graphs.copy()
        steps = random_steps(card, [2, 1, 4, 2, 3, 1, 4, 2, 1, 3])
        found = [graphs.step(*step) for step in steps]
        assert len(host_card(card).recordings) == 3
        monkeypatch.setattr(HostCard, "capture", lambda self, op: op)
        for step, got in zip(steps, found, strict=True):
            assert torch.equal(launched.step(*step), got)
        for mine, its in zip(graphs.cache.layers, launched.cache.layers, strict=True):
            assert torch.equal(mine, its)

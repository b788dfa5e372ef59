"""Deferred experts: what is added one layer late, in which order things run, and who is warned."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.accelerator import Label, Trace
from hybrid_k2.engine import Engine
from hybrid_k2.engine.fingerprint import fingerprint
from hybrid_k2.errors import EngineError, RulesError
from hybrid_k2.experts.base import ELSEWHERE
from hybrid_k2.model.batch import Batch
from hybrid_k2.model.deferral import part_choices
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layers import linear
from hybrid_k2.model.moe import Moe, mixed
from hybrid_k2.model.text import TextModel
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import Rules, make_plan, parse_rules
from tests.generators import write_checkpoint
from tests.models import Loaded, loaded
from tests.unit.placements import K2_6, machine
from tests.unit.test_schedule import BLOCKS, Delayed, random_steps, run, same, watch

needs_native = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")


def rules_of(overlap: str, more: str = "", attention: str = "gpu") -> Rules:
    text = f"""\
version: 1
devices: {{gpu: twin}}
place:
  - {{what: embedding,      on: host}}
  - {{what: attention,      on: {attention}}}
  - {{what: dense_mlp,      on: gpu}}
  - {{what: shared_experts, on: gpu}}
  - {{what: routed_experts, on: host}}
  - {{what: lm_head,        on: gpu}}
{more}kv_cache: {{tokens: 20480}}
overlap: {overlap}
"""
    return parse_rules(text, "x.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("deferral"), seed=8, **BLOCKS)


@contextmanager
def deferring(folder: Path, count: int, mode: str = "ping_pong", more: str = "") -> Iterator[Loaded]:
    with loaded(folder, rules_of(f"{{mode: {mode}, deferred: {count}}}", more), twin_threads=1) as model:
        yield model


@contextmanager
def oracle(folder: Path, count: int) -> Iterator[Loaded]:
    """A model on the host whose layers are written out one after the other."""
    with loaded(folder, "host") as model:
        model.model.forward = partial(forward, model.model, count)  # type: ignore[method-assign]
        yield model


def forward(model: TextModel, count: int, batch: Batch, cache: LatentCache) -> Tensor:
    with torch.inference_mode():
        x = functional.embedding(batch.token_ids, model.embedding).to(model.activation_dtype)
        rotation, rows = model._rope.rotation(batch.positions), batch.logit_rows
        batch = model.layers[0].attention.prepare(batch)
        late: Tensor | float = 0.0
        for index, layer in enumerate(model.layers):
            x = layer.attend(x, batch, cache, rotation)
            normal = layer.post_norm(x)
            if not isinstance(layer.mlp, Moe):
                x = x + layer.mlp(normal)
                continue
            routing = layer.mlp.router(normal)
            waits = index + 1 < len(model.layers)
            now = torch.arange(routing.ids.shape[1]) < routing.ids.shape[1] - (count if waits else 0)
            parts = [
                layer.mlp.experts.forward(normal, torch.where(which, routing.ids, ELSEWHERE), routing.weights)
                for which in (now, ~now)
            ]
            x = x + mixed(parts[0] + late, layer.mlp.shared(normal), normal)
            late = parts[1]
        return linear(model.final_norm(x[rows]), model.lm_head)


@needs_native
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["off", "ping_pong"])
def test_the_last_choices_act_one_layer_late(folder: Path, mode: str, count: int) -> None:
    """Bit for bit what the written-out layers say, also with operations that are late by chance."""
    chance = random.Random()
    with deferring(folder, count, mode) as twin, oracle(folder, count) as expected:
        for _ in range(3):
            steps = random_steps(chance, expected.config.vocab_size)
            assert same(run(twin, steps), run(expected, steps))
        twin.model.accelerator = Delayed(twin.model.accelerator, chance)
        steps = random_steps(chance, expected.config.vocab_size)
        assert same(run(twin, steps), run(expected, steps))


@needs_native
def test_it_is_something_else_than_the_model(folder: Path) -> None:
    steps = [[(0, [5, 6, 7])]]
    with deferring(folder, 2) as twin, loaded(folder, "host") as host:
        assert not same(run(twin, steps), run(host, steps))


@needs_native
@pytest.mark.parametrize(
    "more",
    [
        "  - {what: routed_experts, on: gpu, hottest: 16}\n",
        "prefill: {stream: auto, copy_gbps: 99999, read_gbps: 0.001, token_us: 99999}\n",
    ],
)
def test_hot_and_streamed_experts_are_never_late(folder: Path, more: str) -> None:
    """Where none is left to the host, nothing is deferred: the results are those without deferral."""
    chance = random.Random()
    steps = [[(i, [chance.randrange(200) for _ in range(chance.randint(64, 90))])] for i in range(3)]
    with deferring(folder, 3, more=more) as late, loaded(folder, rules_of("ping_pong", more), twin_threads=1) as usual:
        assert same(run(late, steps), run(usual, steps))


def labels_of(model: Loaded, batch_of: int) -> list[str]:
    model.model.trace = trace = Trace()
    run(model, [[(i, [3 + i]) for i in range(batch_of)]])
    return [str(event.label) for event in trace.events if event.label.lane == "accelerator"]


@needs_native
def test_deferred_experts_run_beside_the_next_front(folder: Path) -> None:
    """One sequence: between `defer` and `collect` there is the front of the next layer, and nothing else."""
    with deferring(folder, 1) as twin:
        labels = labels_of(twin, 1)
        moe = [index for index, layer in enumerate(twin.model.layers) if isinstance(layer.mlp, Moe)]
    wanted = [str(Label(name, layer, 0)) for name, layer in zip(("defer", "front", "collect"), (2, 3, 2), strict=True)]
    start = labels.index(wanted[0])
    assert labels[start : start + 3] == wanted
    assert labels[start + 3] == str(Label("post", 3, 0))
    assert [label for label in labels if label.startswith("defer")] == [str(Label("defer", i, 0)) for i in moe[:-1]]


@needs_native
def test_experts_that_fail_when_they_are_deferred_are_named_and_forgotten(folder: Path) -> None:
    calls: list[str] = []

    def boom(name: str) -> None:
        calls.append(name)
        if len(calls) == 4:  # submit, wait, the deferred submit, and its wait
            raise EngineError("experts: expected no such thing, got it")

    steps = [[(0, [5, 6, 7]), (1, [9])]]
    with deferring(folder, 2, "off") as twin, oracle(folder, 2) as expected:
        watch(twin.model, boom)
        with pytest.raises(EngineError, match="layer 1: experts: expected no such thing"):
            run(twin, steps)
        assert same(run(twin, steps), run(expected, steps))


def test_choices_are_parted_by_rank() -> None:
    ids = torch.tensor([[7, 3, 9, 1], [4, ELSEWHERE, 2, ELSEWHERE]], dtype=torch.int32)
    now, late = part_choices(ids, 1)
    assert now.tolist() == [[7, 3, 9, -1], [4, -1, 2, -1]]
    assert late.tolist() == [[-1, -1, -1, 1], [-1, -1, -1, -1]]
    assert ids.tolist()[0] == [7, 3, 9, 1]


def test_the_plan_says_what_it_does_and_counts_its_memory() -> None:
    with_it, without = (make_plan(rules_of(text), K2_6, machine(768)) for text in ("{deferred: 2}", "auto"))
    assert (with_it.deferred, with_it.overlap, without.deferred) == (2, "ping_pong", 0)
    assert any(note.startswith("overlap: deferred: the last 2 of each token's experts act ") for note in with_it.notes)
    assert not any("deferred" in note for note in without.notes)
    assert "overlap ping_pong; 2 of 8 experts deferred" in with_it.table()
    on_card = [
        make_plan(parse_rules(CARD + f"overlap: {text}\n"), K2_6, machine(768, 48))
        for text in ("{deferred: 2}", "auto")
    ]
    workspace = [next(one.nbytes for one in plan.overheads if one.what == "workspace") for plan in on_card]
    assert workspace[0] - workspace[1] == 512 * K2_6.hidden_size * 4


CARD = """\
version: 1
devices: {gpu: cuda:0}
place:
  - {what: embedding,      on: host}
  - {what: attention,      on: gpu}
  - {what: dense_mlp,      on: gpu}
  - {what: shared_experts, on: gpu}
  - {what: routed_experts, on: host}
  - {what: lm_head,        on: gpu}
"""


@pytest.mark.parametrize(
    ("overlap", "attention", "words"),
    [
        ("{deferred: 8}", "gpu", "overlap: deferred: expected at most 7 (one less than a token chooses), got 8"),
        ("{deferred: 2}", "host", "overlap: deferred: expected 0 (the threads of the experts compute attention too)"),
        ("{deferred: -1}", "gpu", "overlap: deferred: expected a whole number from 0 to"),
        ("{deferred: auto}", "gpu", "overlap: deferred: expected a whole number from 0 to"),
        ("{deferred: 2, mode: fast}", "gpu", "overlap: mode: expected one of auto, off, ping_pong, got 'fast'"),
        ("{deffered: 2}", "gpu", "unknown key 'deffered'"),
    ],
)
def test_what_cannot_be_deferred_is_refused(overlap: str, attention: str, words: str) -> None:
    with pytest.raises(RulesError) as caught:
        make_plan(rules_of(overlap, attention=attention), K2_6, machine(768))
    assert caught.value.message.startswith("x.yaml:11: ")
    assert words in caught.value.message


@needs_native
def test_an_engine_warns_and_reads_no_latents_of_another_kind(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Engine.load(folder, rules_of("{deferred: 1}")) as engine:
        usual = replace(engine.loaded, plan=replace(engine.plan, deferred=0))
        assert fingerprint(usual) != fingerprint(engine.loaded) == fingerprint(replace(usual, plan=engine.plan))
        assert engine.logits([1, 2, 3]).shape == (3, engine.config.vocab_size)
    said = [
        record.message for record in caplog.records if "of each token's experts acts one layer late" in record.message
    ]
    assert len(said) == 1

"""Hot experts on the twin: what is split gives the sums of both sides, whatever the timing; the set follows the use."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_k2.accelerator import HotExperts, Trace, TwinHotExperts
from hybrid_k2.engine import Engine
from hybrid_k2.errors import EngineError
from hybrid_k2.experts import ExpertsBackend
from hybrid_k2.experts.base import ELSEWHERE
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.experts.usage import recall_usage, remember_usage
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.hot_set import COPY_STEPS, Exchange, HotSet, best_exchange
from hybrid_k2.model.text import TextModel
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import Rules, parse_rules
from tests.generators import write_checkpoint
from tests.models import Loaded, loaded, part_by_part
from tests.unit.experts_common import load_random_experts, native_runtime, random_routing
from tests.unit.test_schedule import BLOCKS, Delayed, moe_layers, random_steps, run, same, watch

pytestmark = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")

HOT = 5  # of 16 experts


def hot_rules(more: str = "", overlap: str = "ping_pong") -> Rules:
    return parse_rules(f"""\
version: 1
devices: {{gpu: twin}}
place:
  - {{what: embedding,      on: host}}
  - {{what: attention,      on: gpu}}
  - {{what: dense_mlp,      on: gpu}}
  - {{what: shared_experts, on: gpu}}
  - {{what: routed_experts, on: host}}
  - {{what: routed_experts, on: gpu, hottest: {HOT}{more}}}
  - {{what: lm_head,        on: gpu}}
kv_cache: {{tokens: 20480}}
overlap: {overlap}
""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hot"), seed=6, **BLOCKS)


@contextmanager
def hot_model(folder: Path, more: str = "", overlap: str = "ping_pong") -> Iterator[Loaded]:
    with loaded(folder, hot_rules(more, overlap), twin_threads=1) as model:
        yield model


class Split(ExpertsBackend):
    """Compute all experts of a layer on the host, and add the hot ones' sum to the others': the oracle."""

    def __init__(self, inner: ExpertsBackend, hot: Callable[[], frozenset[int]]) -> None:
        super().__init__(inner.shape)
        self.inner, self.hot = inner, hot

    nbytes = 0  # type: ignore[assignment]

    def load_expert(self, expert: int, weights: Any) -> None:
        raise NotImplementedError

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hot = torch.isin(ids, torch.tensor(sorted(self.hot()), dtype=torch.int32))
        parts = [self.inner.forward(hidden, ids, torch.where(chosen, weights, 0.0)) for chosen in (~hot, hot)]
        return parts[0] + parts[1]

    def submit(self, slot: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        raise NotImplementedError

    def wait(self, slot: int, timeout_s: float | None = None) -> Tensor:
        raise NotImplementedError

    def close(self) -> None:
        return


@contextmanager
def split_host(folder: Path, hot: Callable[[int], frozenset[int]]) -> Iterator[Loaded]:
    """Everything on the host, with the sums of a model that has hot experts; `hot` says which, by layer."""
    with loaded(folder, "host") as model:
        part_by_part(model.model)
        for index, layer in enumerate(list(model.model.layers)):
            if index in moe_layers(model.model):
                split = Split(layer.mlp.experts, lambda index=index: hot(index))  # type: ignore[union-attr]
                model.model.handoff._layers[index] = split  # type: ignore[attr-defined]
        yield model


def hot_of(model: TextModel) -> dict[int, HotExperts]:
    return {index: moe.hot for index, moe in moe_layers(model).items() if moe.hot is not None}


def in_memory(model: TextModel) -> dict[int, tuple[set[int], set[int]]]:
    """The experts of each layer that the host's memory holds, and those that the twin's does."""
    held = {}
    for index, moe in moe_layers(model).items():
        assert isinstance(moe.experts, NativeExperts)
        assert isinstance(moe.hot, TwinHotExperts)
        held[index] = loaded_in(moe.experts), loaded_in(moe.hot._layer)
    return held


def loaded_in(layer: NativeExperts) -> set[int]:
    found = set()
    for expert in range(layer.shape.n_routed_experts):
        try:
            layer.verify(expert)
            found.add(expert)
        except ValueError:
            pass
    return found


@pytest.mark.parametrize("overlap", ["off", "ping_pong"])
def test_both_sides_together_give_the_sums_of_both_sets(folder: Path, overlap: str) -> None:
    with hot_model(folder, overlap=overlap) as twin:
        follow(twin, look_tokens=1 << 40)  # never
        sets = {index: hot.experts for index, hot in hot_of(twin.model).items()}
        assert {len(experts) for experts in sets.values()} == {HOT}
        with split_host(folder, sets.__getitem__) as host:
            for _ in range(6):
                steps = random_steps(random.Random(), host.config.vocab_size)
                assert same(run(twin, steps), run(host, steps))


def test_the_split_differs_from_the_whole_by_rounding() -> None:
    """Both add the same K products of a row, in another order: of fp32 sums, K + 1 and K + 2 roundings each."""
    runtime, top_k = native_runtime(), 4
    whole, part, hot = (runtime.make_layer(128, 96, 9, top_k) for _ in range(3))
    load_random_experts(whole, part, hot)
    x, (ids, weights) = torch.randn(40, 128), random_routing(40, 9, top_k)
    twin = TwinHotExperts(hot, [1, 4, 5, 8])  # type: ignore[arg-type]
    got = part.forward(x, twin.elsewhere(ids), weights) + twin.forward(x, ids, weights)
    one = torch.zeros(top_k)
    products = [
        whole.forward(x, ids, torch.where(one.index_fill(0, torch.tensor(k), 1).bool(), weights, 0.0))
        for k in range(top_k)
    ]
    size = torch.stack(products).abs().sum(0)
    difference = (got - whole.forward(x, ids, weights)).abs()
    assert difference.max() > 0, "or the order would not matter, and this test nothing"
    assert (difference <= (2 * top_k + 3) * 2**-24 * size).all()
    runtime.close()


def test_an_expert_is_in_one_memory_unless_the_rule_says_otherwise(folder: Path) -> None:
    everyone = set(range(16))
    with hot_model(folder) as once, hot_model(folder, ", also_on_host: true") as twice:
        for on_host, on_twin in in_memory(once.model).values():
            assert (on_host | on_twin, on_host & on_twin) == (everyone, set())
        assert all(sets == (everyone, set(range(HOT))) for sets in in_memory(twice.model).values())
        for model, plan in ((once.model, once.plan), (twice.model, twice.plan)):
            moe = moe_layers(model)
            assert sum(part.experts.nbytes for part in moe.values()) == plan.expert_bytes
            hot = sum(part.hot._layer.nbytes for part in moe.values())  # type: ignore[union-attr]
            assert hot == sum(row.nbytes for row in plan.rows if row.hottest)


def follow(model: Loaded, look_tokens: int = 1) -> HotSet:
    """Let the set follow the counts closely."""
    hot_set = model.model.hot
    assert hot_set is not None
    hot_set._look_tokens = hot_set._until_look = look_tokens
    return hot_set


def biased_steps(chance: random.Random, tokens: list[int], count: int) -> list[list[tuple[int, list[int]]]]:
    """Prompts of few different tokens, which choose few experts again and again."""
    return [
        [(i, [chance.choice(tokens) for _ in range(chance.randint(8, 30))]) for i in range(3)] for _ in range(count)
    ]


@pytest.mark.parametrize("more", ["", ", also_on_host: true"])
def test_the_set_follows_the_use_and_the_sums_stay_right(folder: Path, more: str) -> None:
    chance = random.Random()
    steps = biased_steps(chance, [chance.randrange(200) for _ in range(2)], 40)
    everyone = set(range(16))
    with hot_model(folder, more) as twin, split_host(folder, lambda i: hot_of(twin.model)[i].experts) as host:
        follow(twin)
        twin.model.trace = trace = Trace()
        before = {index: hot.experts for index, hot in hot_of(twin.model).items()}
        cache, oracle = twin.cache(), host.cache()
        for step in steps:
            assert same(*(run_step(model, own, step) for model, own in ((twin, cache), (host, oracle))))
            for index, (on_host, on_twin) in in_memory(twin.model).items():
                assert on_twin == hot_of(twin.model)[index].experts
                assert on_host == (everyone if more else everyone - on_twin)
        after = {index: hot.experts for index, hot in hot_of(twin.model).items()}
        exchanged = sum(event.label.name == "exchange" for event in trace.events)
        assert exchanged >= 3
        assert before != after
        assert sum(event.label.lane == "copies" for event in trace.events) - exchanged in (0, 1), (
            "one may be on its way"
        )
        rates = {index: usage.take_hit_rate() for index, usage in twin.model.usage.items()}
        counts = {index: usage.counts() for index, usage in twin.model.usage.items()}
        used = [sum(counts[i][expert] for i in counts for expert in sets[i]) for sets in (before, after)]
        assert used[0] < used[1]
        assert all(0 < (rate or 0) <= 1 for rate in rates.values())


def run_step(model: Loaded, cache: Any, step: list[tuple[int, list[int]]]) -> dict[int, list[Tensor]]:
    """Start the sequences of a step anew and return their logits."""
    chunks = [Chunk(ids, 0, [4 * i, 4 * i + 1]) for i, ids in step]
    out = model.model.forward(Batch.build(chunks, all_logits=True), cache)
    return {i: [part] for (i, _), part in zip(step, out.split([len(ids) for _, ids in step]), strict=True)}


def test_which_experts_are_hot_in_a_step_does_not_depend_on_any_timing(folder: Path) -> None:
    """Operations, experts and copies late by chance, halves or not: the same sets after a step, and the same bits."""
    chance = random.Random()
    steps = biased_steps(chance, [3, 77], 25)
    histories, results = [], []
    for late in (False, True):
        with hot_model(folder, overlap="ping_pong" if late else "off") as twin:
            follow(twin)
            if late:
                twin.model.accelerator = Delayed(twin.model.accelerator, chance)
                for hot in hot_of(twin.model).values():
                    hot.bring = delayed(hot.bring, chance)  # type: ignore[method-assign]
            cache, history, logits = twin.cache(), [], []
            for step in steps:
                logits.append(run_step(twin, cache, step))
                history.append([sorted(hot.experts) for hot in hot_of(twin.model).values()])
            histories.append(history)
            results.append(logits)
    assert histories[0] == histories[1]
    assert histories[0][0] != histories[0][-1]
    assert all(same(*pair) for pair in zip(*results, strict=True))


def delayed(call: Callable[..., None], chance: random.Random) -> Callable[..., None]:
    def late(*arguments: Any) -> None:
        time.sleep(chance.choice([0.0, 0.05 * chance.random()]))
        call(*arguments)

    return late


def test_a_copy_that_fails_leaves_the_set_as_it_is(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = biased_steps(random.Random(), [3, 77], 3 * COPY_STEPS)
    with hot_model(folder) as twin, split_host(folder, lambda i: hot_of(twin.model)[i].experts) as host:
        follow(twin)
        before = in_memory(twin.model)
        whole = {}
        for index, hot in hot_of(twin.model).items():
            whole[index], hot.bring = hot.bring, fails  # type: ignore[method-assign]
        cache, oracle = twin.cache(), host.cache()
        for step in steps:
            assert same(run_step(twin, cache, step), run_step(host, oracle, step))
        assert in_memory(twin.model) == before
        assert "does not become a hot one: the copy broke" in caplog.text
        for index, hot in hot_of(twin.model).items():
            hot.bring = whole[index]  # type: ignore[method-assign]
        for step in steps:
            assert same(run_step(twin, cache, step), run_step(host, oracle, step))
        assert in_memory(twin.model) != before


def fails(*arguments: Any) -> None:
    raise EngineError("the copy broke")


def test_a_step_that_fails_before_an_exchange_does_not_lose_it(folder: Path) -> None:
    steps = biased_steps(random.Random(), [3, 77], 30)
    with hot_model(folder) as twin:
        follow(twin)
        cache, failed = twin.cache(), 0
        broken = threading.Event()

        def boom(name: str) -> None:
            if broken.is_set():
                raise EngineError("experts: expected no such thing, got it")

        watch(twin.model, boom)
        before = in_memory(twin.model)
        for number, step in enumerate(steps):
            broken.set() if number % 3 == 1 else broken.clear()
            try:
                run_step(twin, cache, step)
            except EngineError:
                failed += 1
            for on_host, on_twin in in_memory(twin.model).values():
                assert not on_host & on_twin
                assert len(on_host | on_twin) == 16
        assert failed == 10
        assert in_memory(twin.model) != before


@pytest.mark.parametrize("after", ["accelerator", "host"])
def test_an_interrupt_in_an_exchange_does_not_lose_an_expert(folder: Path, after: str) -> None:
    """It comes when one memory has changed, or both have; a GPU's operations are called by the thread that gets it."""
    with hot_model(folder) as twin, split_host(folder, lambda i: hot_of(twin.model)[i].experts) as host:
        follow(twin)
        came: list[str] = []

        def interrupted(call: Callable[..., None]) -> Callable[..., None]:
            def once(*arguments: Any) -> None:
                call(*arguments)
                if not came:
                    came.append("Ctrl-C")
                    raise KeyboardInterrupt

            return once

        for moe in moe_layers(twin.model).values():
            if after == "host":
                moe.experts.replace_expert = interrupted(moe.experts.replace_expert)  # type: ignore[attr-defined]
            elif moe.hot is not None:
                moe.hot.exchange = interrupted(moe.hot.exchange)  # type: ignore[method-assign]
        cache, oracle = twin.cache(), host.cache()
        for step in biased_steps(random.Random(), [3, 77], 20):
            before = len(came)
            try:
                got = run_step(twin, cache, step)
            except KeyboardInterrupt:
                got = run_step(twin, cache, step)
                assert len(came) == before + 1
            assert same(got, run_step(host, oracle, step))
        assert came
        assert all(len(on_host | on_twin) == 16 for on_host, on_twin in in_memory(twin.model).values())


@pytest.mark.parametrize("why", [TimeoutError(), EngineError("the memory is damaged")])
def test_a_warning_says_why_a_copy_did_not_come(why: Exception, caplog: pytest.LogCaptureFixture) -> None:
    hot_set, copied = HotSet({}), Future[Any]()
    copied.set_exception(why)
    hot_set._make(Exchange(2, 0, 1), copied)
    hot_set.close()
    (record,) = caplog.records
    assert str(why) in record.message
    assert not record.message.endswith(": ")


def test_closing_waits_for_a_copy(folder: Path) -> None:
    with hot_model(folder) as twin:
        follow(twin)
        for hot in hot_of(twin.model).values():
            hot.bring = delayed_always(hot.bring)  # type: ignore[method-assign]
        for step in biased_steps(random.Random(), [3], 3):
            run_step(twin, twin.cache(), step)
    assert not any(thread.name.startswith("hot-experts") for thread in threading.enumerate())


def delayed_always(call: Callable[..., None]) -> Callable[..., None]:
    def late(*arguments: Any) -> None:
        time.sleep(0.2)
        call(*arguments)

    return late


def test_an_exchange_must_gain_more_than_chance() -> None:
    counts = {1: [100, 104, 96, 100], 2: [100, 40, 90, 95]}
    assert best_exchange(counts, {1: {2}, 2: {0}}) is None
    assert best_exchange(counts, {1: {2}, 2: {1, 2}}) == Exchange(2, 1, 0)
    assert best_exchange({1: [0, 9], 2: [0, 30], 3: [0, 30]}, {1: {0}, 2: {0}, 3: {0}}) == Exchange(2, 0, 1)
    assert best_exchange({1: [0, 8]}, {1: {0}}) is None
    assert best_exchange({1: [5, 9]}, {1: {0, 1}}) is None
    assert best_exchange({1: [5, 900]}, {1: set()}) is None


def test_the_use_is_remembered_for_the_next_plan(folder: Path, tmp_path: Path) -> None:
    rules = hot_rules()
    copy = write_checkpoint(tmp_path / "own", seed=6, **BLOCKS)
    with Engine.load(copy, rules) as engine:
        assert engine.plan.hot_experts(1) == tuple(range(HOT))
        assert any("not known here yet" in note for note in engine.plan.notes)
        for _ in range(20):
            engine.logits([3, 77] * 20)
    counts = recall_usage(copy, engine.config.moe_layers, 16)
    assert {layer: sum(each) for layer, each in counts.items()} == dict.fromkeys((1, 2, 3), 20 * 40 * 4)
    with Engine.load(copy, rules) as engine:
        assert not any("not known here" in note for note in engine.plan.notes)
        for layer, each in counts.items():
            best = sorted(range(16), key=lambda expert, each=each: -each[expert])[:HOT]
            assert set(engine.plan.hot_experts(layer)) == set(best)
        engine.logits([5] * 10)
    again = recall_usage(copy, engine.config.moe_layers, 16)
    assert sum(again[1]) == sum(counts[1]) + 40


@pytest.mark.parametrize(
    "content",
    [b"", b"[", b"3", b'{"key": "other"}', b'{"key": KEY, "counts": 3}', b'{"key": KEY, "counts": {"1": [1, 2]}}',
     b'{"key": KEY, "counts": {"1": [1, 2, -3], "2": [1, 2, 3]}}', b'{"key": KEY, "counts": {"1": [1, 2, 3]}}',
     b'{"key": KEY, "counts": {"1": [1, 2, true], "2": [1, 2, 3]}}',
     b'{"key": KEY, "counts": {"1": [1, 2, 9999999999999999999], "2": [1, 2, 3]}}'],
)  # fmt: skip
def test_a_damaged_file_is_as_none(tmp_path: Path, content: bytes) -> None:
    remember_usage(tmp_path, {1: [1, 2, 3], 2: [4, 5, 6]}, tmp_path)
    assert recall_usage(tmp_path, (1, 2), 3, tmp_path) == {1: [1, 2, 3], 2: [4, 5, 6]}
    assert recall_usage(tmp_path / "other", (1, 2), 3, tmp_path) == {}
    (file,) = tmp_path.glob("usage-*.json")
    key = json.dumps(json.loads(file.read_text())["key"]).encode()
    file.write_bytes(content.replace(b"KEY", key))
    assert recall_usage(tmp_path, (1, 2), 3, tmp_path) == {}


def test_what_is_not_hot_has_no_copy(folder: Path) -> None:
    with hot_model(folder) as twin:
        hot = hot_of(twin.model)[1]
        with pytest.raises(ValueError, match="a loaded one, got 15"):
            hot.copy(15)
        assert hot.elsewhere(torch.tensor([[0, 15, 4]], dtype=torch.int32)).tolist() == [[ELSEWHERE, 15, ELSEWHERE]]

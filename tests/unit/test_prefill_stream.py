"""A prompt's experts split between host and twin by cost: the right sums, the same ones for any timing, and errors."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.accelerator import Trace
from hybrid_k2.accelerator.pinning import PinnedMemory
from hybrid_k2.accelerator.stream import PLACES, TOGETHER, TwinExpertStream
from hybrid_k2.errors import EngineError, RulesError
from hybrid_k2.experts.base import ELSEWHERE
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.experts.remembered import cache_folder
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.prefill_split import LEAST_TOKENS, PrefillSplit, SplitCosts, heavy_experts
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import Rules, parse_rules
from tests.generators import write_checkpoint
from tests.models import Loaded, loaded
from tests.unit.experts_common import load_random_experts, native_runtime, random_routing
from tests.unit.test_schedule import BLOCKS, Delayed

needs_native = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")

# A copy costs as much as reading two experts, and many tokens are needed before one costs more than its weights.
COSTS = "copy_gbps: 10, read_gbps: 20, token_us: 0.05"


def stream_rules(costs: str = f", {COSTS}", hot: str = "", numerics: str = "exact") -> Rules:
    return parse_rules(f"""\
version: 1
devices: {{gpu: twin}}
place:
  - {{what: embedding,      on: host}}
  - {{what: attention,      on: gpu}}
  - {{what: dense_mlp,      on: gpu}}
  - {{what: shared_experts, on: gpu}}
  - {{what: routed_experts, on: host}}
  - {{what: lm_head,        on: gpu}}
{hot}kv_cache: {{tokens: 20480}}
numerics: {numerics}
prefill: {{stream: auto{costs}}}
""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("stream"), seed=8, **BLOCKS)


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[Loaded]:
    with loaded(folder, "host") as model:
        yield model


@contextmanager
def stream_model(folder: Path, *rules: str, **more: str) -> Iterator[Loaded]:
    with loaded(folder, stream_rules(*rules, **more), twin_threads=1) as model:
        yield model


def split_of(model: Loaded) -> PrefillSplit:
    split = model.model.split
    assert split is not None
    return split


def prompts(chance: random.Random, lengths: list[int], vocab: int) -> Batch:
    chunks = [
        Chunk([chance.randrange(vocab) for _ in range(length)], 0, range(20 * i, 20 * i + 20))
        for i, length in enumerate(lengths)
    ]
    return Batch.build(chunks, all_logits=True)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare logits, which are about 1, where a last bit may become a step of 16-bit activations.

    In a few rows it may even choose another expert. One that is missing, or another in its place, changes a quarter of
    all rows by some 0.1.
    """
    return bool(((one - other).abs().amax(dim=1) < 5e-3).float().mean() > 0.9)


@given(
    st.lists(st.integers(1, 300), max_size=14),
    st.floats(1, 99),
    st.floats(1, 99),
    st.floats(0.01, 9),
    st.integers(0, 4),
)
def test_both_sides_end_together(counts: list[int], copy: float, read: float, token: float, coming: int) -> None:
    costs = SplitCosts(copy, read, token)
    tokens = {3 * i: count for i, count in enumerate(counts)}
    on_the_way = list(tokens)[:coming]
    heavy = heavy_experts(tokens, costs, on_the_way)
    assert not set(heavy) & set(on_the_way)
    rest = {expert: count for expert, count in tokens.items() if expert not in on_the_way}

    def slower(taken: list[int]) -> float:
        host = sum(costs.on_host(count) for expert, count in rest.items() if expert not in taken)
        return max(host, len(taken) * copy)

    ranked = sorted(rest, key=lambda expert: (-rest[expert], expert))
    assert heavy == ranked[: len(heavy)]
    best = min(slower(ranked[:count]) for count in range(len(ranked) + 1))
    assert slower(heavy) == pytest.approx(best)


def test_what_an_expert_costs_on_the_host() -> None:
    costs = SplitCosts(copy=450, read=60, token=12)
    assert [costs.on_host(tokens) for tokens in (0, 1, 5, 6, 100)] == [0, 60, 60, 72, 1200]
    assert heavy_experts({7: 100, 1: 2, 4: 90}, costs) == [7, 4]
    assert heavy_experts({7: 30, 1: 2}, costs) == []
    assert heavy_experts({}, costs) == []


class Streaming:
    """A layer, and the stream that brings its experts."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.runtime, self.top_k = native_runtime(), 4
        self.layers = {i: self._layer(12) for i in (1, 2)}
        for layer in self.layers.values():
            load_random_experts(layer)
        self.stream = TwinExpertStream(self.layers, self._layer(PLACES), timeout_s)

    def _layer(self, experts: int) -> NativeExperts:
        layer = self.runtime.make_layer(128, 96, experts, self.top_k)
        assert isinstance(layer, NativeExperts)
        return layer

    def close(self) -> None:
        self.stream.close()
        self.runtime.close()


@pytest.fixture
def streaming() -> Iterator[Streaming]:
    one = Streaming()
    yield one
    one.close()


def test_streamed_and_other_experts_give_the_whole_but_for_rounding(streaming: Streaming) -> None:
    """The same K products of a row in another order, of fp32: each side rounds K times, and they are added."""
    x, (ids, weights), k = torch.randn(150, 128), random_routing(150, 12, streaming.top_k), streaming.top_k
    for _ in range(4):
        streaming.stream.begin()
        order = torch.randperm(12)[:9].tolist()
        asked = {layer: streaming.stream.ask(layer, order) for layer in (1, 2)}
        for number, layer in streaming.layers.items():
            streamed = torch.isin(ids, torch.tensor(order, dtype=torch.int32))
            got = streaming.stream.compute(asked[number], x, torch.where(streamed, ids, ELSEWHERE), weights)
            got += layer.forward(x, torch.where(streamed, ELSEWHERE, ids), weights)
            one = torch.eye(k, dtype=torch.bool)
            size = torch.stack([layer.forward(x, ids, torch.where(one[i], weights, 0.0)).abs() for i in range(k)]).sum(
                0
            )
            assert ((got - layer.forward(x, ids, weights)).abs() <= (2 * k + 4) * 2**-24 * size).all()


def test_what_was_asked_for_in_a_step_that_failed_is_forgotten(streaming: Streaming) -> None:
    x, (ids, weights) = torch.randn(5, 128), random_routing(5, 12, streaming.top_k)
    for size in (3, PLACES, 11):
        streaming.stream.begin()
        streaming.stream.ask(1, list(range(size)))  # and nobody computes them
    streaming.stream.begin()
    everyone = list(range(12))
    got = streaming.stream.compute(streaming.stream.ask(2, everyone), x, ids, weights)
    assert torch.allclose(got, streaming.layers[2].forward(x, ids, weights), atol=1e-4)


def test_a_copy_that_fails_or_is_late_is_named() -> None:
    streaming = Streaming(timeout_s=0.2)
    stream, x, (ids, weights) = streaming.stream, torch.randn(5, 128), random_routing(5, 12, streaming.top_k)
    whole, go = stream._copy, threading.Event()

    def broken(source: NativeExperts, expert: int, place: int) -> None:
        if expert == 5:
            raise RuntimeError("the bus is gone")
        if expert == 6:
            go.wait(60)
        whole(source, expert, place)

    stream._copy = broken  # type: ignore[method-assign]
    for expert, message in ((5, "copied to the accelerator, got: the bus is gone"), (6, r"within 0\.2 s, got none")):
        stream.begin()
        with pytest.raises(EngineError, match=f"layer 1: expert {expert}: expected it .*{message}"):
            stream.compute(stream.ask(1, [1, expert, 2]), x, ids, weights)
    go.set()
    stream._timeout_s = 60
    stream.begin()
    got = stream.compute(stream.ask(1, [1, 2, 3]), x, torch.full_like(ids, 3), torch.ones_like(weights))
    assert torch.allclose(
        got, streaming.layers[1].forward(x, torch.full_like(ids, 3), torch.ones_like(weights)), atol=1e-4
    )
    waiting = threading.Thread(target=lambda: time.sleep(0.1) or stream.close())  # type: ignore[func-returns-value]
    go.clear()
    stream.begin()
    waiting.start()
    threading.Timer(0.3, go.set).start()
    with pytest.raises(EngineError, match="got a closed stream"):
        stream.compute(stream.ask(1, [6]), x, ids, weights)
    waiting.join()
    streaming.runtime.close()


# A model


@needs_native
@pytest.mark.parametrize("hot", ["", "  - {what: routed_experts, on: gpu, hottest: 4}\n"])
def test_prompts_say_what_they_say_on_the_host(folder: Path, host: Loaded, hot: str) -> None:
    chance = random.Random()
    with stream_model(folder, hot=hot) as twin:
        if twin.model.hot is not None:
            twin.model.hot._look_tokens = twin.model.hot._until_look = 1
        for lengths in ([200], [LEAST_TOKENS], [5, 3], [150, 90], [300, 1, 1], [70, 80, 90]):
            batch = prompts(chance, lengths, host.config.vocab_size)
            twin.model.trace = trace = Trace()
            got = twin.model.forward(batch, twin.cache())
            assert close(got, host.model.forward(batch, host.cache()))
            streams = any(event.label.name == "stream" for event in trace.events)
            assert streams == (max(lengths) >= LEAST_TOKENS)
            copied = [event for event in trace.events if event.label.lane == "copies" and event.label.name != "hot"]
            assert bool(copied) == streams


@needs_native
def test_copies_and_host_work_beside_the_twin(folder: Path, host: Loaded) -> None:
    """Both take a part of the experts; the copies for a layer begin before its router has chosen."""
    with stream_model(folder) as twin:
        batch = prompts(random.Random(), [300], host.config.vocab_size)
        twin.model.forward(batch, twin.cache())  # its use is what the next one goes by
        twin.model.trace = trace = Trace()
        twin.model.forward(batch, twin.cache())
        posts = {e.label.layer: e for e in trace.events if e.label.name == "post"}
        for layer in (2, 3):
            early = [e for e in trace.events if e.label.lane == "copies" and e.label.layer == layer]
            assert TOGETHER <= len(early) < 16, "not all of them, and those of the prediction at least"
            assert min(e.start_ns for e in early) < posts[layer].start_ns
        assert {e.label.layer for e in trace.events if e.label.lane == "experts"} == {1, 2, 3}


@needs_native
def test_the_split_does_not_depend_on_any_timing(folder: Path) -> None:
    chance = random.Random()
    batches = [prompts(chance, lengths, 500) for lengths in ([250], [90, 130], [100, 2], [70])]
    results, copies = [], []
    for late in (False, True):
        with stream_model(folder) as twin:
            stream = split_of(twin).stream
            if late:
                twin.model.accelerator = Delayed(twin.model.accelerator, chance)
                stream._copy = delayed(stream._copy, chance)  # type: ignore[method-assign]
            asked: list[Any] = []
            stream.ask = recorded(stream.ask, asked)  # type: ignore[method-assign]
            results.append([twin.model.forward(batch, twin.cache()) for batch in batches])
            copies.append(asked)
    assert copies[0] == copies[1]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def delayed(call: Callable[..., None], chance: random.Random) -> Callable[..., None]:
    def late(*arguments: Any) -> None:
        time.sleep(chance.choice([0.0, 0.005 * chance.random()]))
        call(*arguments)

    return late


def recorded(call: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        calls.append(arguments)
        return call(*arguments)

    return noted


@needs_native
def test_a_step_whose_copy_fails_is_followed_by_one_that_is_right(folder: Path, host: Loaded) -> None:
    chance = random.Random()
    with stream_model(folder) as twin:
        stream = split_of(twin).stream
        whole: Callable[..., None] = stream._copy
        for _ in range(3):
            left = chance.randint(0, 25)

            def broken(*arguments: Any) -> None:
                nonlocal left
                left -= 1
                if left == -1:
                    raise RuntimeError("the bus is gone")
                whole(*arguments)

            stream._copy = broken  # type: ignore[method-assign]
            batch = prompts(chance, [250], host.config.vocab_size)
            try:
                twin.model.forward(batch, twin.cache())
            except EngineError as error:
                assert "the bus is gone" in error.message  # noqa: PT017 - where few are copied, none fails
            stream._copy = whole  # type: ignore[method-assign]
            assert close(twin.model.forward(batch, twin.cache()), host.model.forward(batch, host.cache()))
    assert not any(thread.name == "k2-stream" for thread in threading.enumerate())


@needs_native
def test_costs_are_stated_or_measured_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expert = 3 * 64 * 64 * 18 / 32  # bytes
    with stream_model(folder) as twin:
        assert split_of(twin).costs == SplitCosts(expert / 10e3, expert / 20e3, 0.05)
    assert not list(cache_folder().glob("split-*"))
    with stream_model(folder, ", copy_gbps: 10") as twin:
        first = split_of(twin).costs
        assert first.copy == expert / 10e3
        assert first.read > 0
        assert first.token > 0
    (file,) = cache_folder().glob("split-*")
    monkeypatch.setattr("hybrid_k2.model.stream_loading._measure", lambda *_: pytest.fail("it was measured before"))
    with stream_model(folder, ", copy_gbps: auto, token_us: 7") as twin:
        assert split_of(twin).costs.read == first.read
        assert split_of(twin).costs.token == 7
    for damaged in ("", "3", '{"key": "", "costs": {}}', file.read_text().replace('"read": ', '"read": -')):
        file.write_text(damaged)
        with pytest.raises(pytest.fail.Exception, match="it was measured before"), stream_model(folder, ""):
            pass


@needs_native
def test_all_experts_may_be_hot(folder: Path, host: Loaded) -> None:
    with stream_model(folder, hot="  - {what: routed_experts, on: gpu, hottest: 16}\n") as twin:
        assert twin.model.split is None
        batch = prompts(random.Random(), [100], host.config.vocab_size)
        assert close(twin.model.forward(batch, twin.cache()), host.model.forward(batch, host.cache()))


def test_what_cannot_be_streamed_is_refused(folder: Path) -> None:
    with (
        pytest.raises(
            RulesError, match=r"rules:12: prefill: stream: expected INT4 experts, .* got numerics: reference"
        ),
        stream_model(folder, numerics="reference"),
    ):
        pass
    for wrong in ("copy_gbps: 0", "read_gbps: -3", "token_us: 1e3", "token_us: many"):
        with pytest.raises(
            RulesError, match=rf"rules:12: prefill: {wrong.split(':')[0]}: expected auto or a number above 0"
        ):
            stream_rules(f", {wrong}")


# Pinned memory


def test_memory_is_pinned_in_parts_and_let_go() -> None:
    pinned: list[tuple[int, int]] = []
    memory = PinnedMemory(
        [(1000, 250), (5000, 100), (9000, 0)], lambda *part: pinned.append(part), pinned_away(pinned), 100
    )
    memory._thread.join()
    assert pinned == [(1000, 100), (1100, 100), (1200, 50), (5000, 100)]
    memory.close()
    assert pinned == []


def pinned_away(pinned: list[tuple[int, int]]) -> Callable[[int], None]:
    def unpin(address: int) -> None:
        pinned.remove(next(part for part in pinned if part[0] == address))

    return unpin


def test_memory_that_cannot_be_pinned_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pinned: list[tuple[int, int]] = []

    def register(address: int, nbytes: int) -> None:
        if len(pinned) == 2:
            raise RuntimeError("no more")
        pinned.append((address, nbytes))

    memory = PinnedMemory([(0, 500)], register, pinned_away(pinned), 100)
    memory._thread.join()
    assert caplog.text.count("2 of 5 parts of the experts' memory are pinned, and no more: no more;") == 1
    memory.close()
    assert pinned == []


def test_closing_does_not_wait_for_all_parts() -> None:
    began, go, pinned = threading.Event(), threading.Event(), []

    def register(address: int, nbytes: int) -> None:
        began.set()
        go.wait(60)
        pinned.append((address, nbytes))

    memory = PinnedMemory([(0, 500)], register, pinned_away(pinned), 100)
    began.wait(60)
    threading.Timer(0.1, go.set).start()
    memory._stop.set()
    memory.close()
    assert pinned == []

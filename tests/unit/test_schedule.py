"""A forward pass on the accelerator: the same bits however it is cut and timed; errors and interrupts in between."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_k2.accelerator import (
    Accelerator,
    DirectHandoff,
    HostTwin,
    InlineAccelerator,
    Label,
    MailboxHandoff,
    SubmitHandoff,
    TimeLimit,
)
from hybrid_k2.engine import Engine
from hybrid_k2.errors import ConfigError, EngineError
from hybrid_k2.experts import ExpertsBackend
from hybrid_k2.experts.base import ExpertsShape, QueuedBackend
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.text import TextModel
from hybrid_k2.native import NATIVE_ERROR
from tests.generators import write_checkpoint
from tests.models import Loaded, loaded, part_by_part

needs_native = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")


# All matrices in whole blocks of 32: the native kernels compute them, which give a row the same bits in any batch.
BLOCKS = {"num_hidden_layers": 4, "q_lora_rank": 64, "qk_rope_head_dim": 32}


Step = list[tuple[int, list[int]]]  # sequence and new tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("blocks"), seed=4, **BLOCKS)


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[Loaded]:
    """Everything on the host, inline: what the others are compared with."""
    with loaded(folder, "host") as model:
        yield model


@contextmanager
def twin_model(folder: Path, overlap: str = "ping_pong") -> Iterator[Loaded]:
    with loaded(folder, "twin", overlap=overlap, twin_threads=1) as model:
        assert isinstance(model.model.accelerator, HostTwin)
        yield model


@pytest.fixture
def twin(folder: Path) -> Iterator[Loaded]:
    with twin_model(folder) as model:
        yield model


def moe_layers(model: TextModel) -> dict[int, Moe]:
    return {i: layer.mlp for i, layer in enumerate(model.layers) if isinstance(layer.mlp, Moe)}


class Delayed(Accelerator):
    """Let each operation begin and end late, by chance."""

    def __init__(self, inner: Accelerator, chance: random.Random) -> None:
        self.name, self.device, self.inner, self.chance = inner.name, inner.device, inner, chance

    def enqueue(self, op: Callable[[], None], label: Label) -> None:
        before, after = (self.chance.choice([0.0, 0.0, self.chance.random() * 1e-3]) for _ in range(2))

        def late() -> None:
            time.sleep(before)
            op()
            time.sleep(after)

        self.inner.enqueue(late, label)

    def synchronize(self, timeout_s: float | None = None) -> None:
        self.inner.synchronize(timeout_s)

    def abandon(self) -> None:
        self.inner.abandon()

    def close(self) -> None:
        self.inner.close()


class Watched(ExpertsBackend):
    """Pass calls on, behind what `before` does with the name of the call."""

    def __init__(self, inner: ExpertsBackend, before: Callable[[str], None]) -> None:
        super().__init__(inner.shape)
        self.inner, self.before = inner, before

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def load_expert(self, expert: int, weights: Any) -> None:
        self.inner.load_expert(expert, weights)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.before("forward")
        return self.inner.forward(hidden, ids, weights)

    def submit(self, slot: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        self.before("submit")
        self.inner.submit(slot, hidden, ids, weights)

    def wait(self, slot: int, timeout_s: float | None = None) -> Tensor:
        self.before("wait")
        return self.inner.wait(slot, timeout_s)

    def close(self) -> None:
        self.inner.close()


def watch(model: TextModel, before: Callable[[str], None], *, only: int | None = None) -> None:
    """Put `before` in front of the calls to the experts of all layers, or of one."""
    experts: dict[int, ExpertsBackend] = {}
    for index, moe in moe_layers(model).items():
        experts[index] = moe.experts if only not in (None, index) else Watched(moe.experts, before)
    model.handoff.close()
    inline = isinstance(model.accelerator, InlineAccelerator)
    model.handoff = DirectHandoff(experts) if inline else SubmitHandoff(experts)
    part_by_part(model)  # whole layers know their experts


def random_steps(chance: random.Random, vocab: int) -> list[Step]:
    """Draw steps of up to 7 sequences that start and end at different times."""
    steps = []
    for _ in range(5):
        members = sorted(chance.sample(range(7), chance.randint(1, 7)))
        sizes = [chance.choice([1, 1, chance.randint(2, 40)]) for _ in members]
        steps.append([(m, [chance.randrange(vocab) for _ in range(n)]) for m, n in zip(members, sizes, strict=True)])
    return steps


def run(
    model: Loaded, steps: Sequence[Sequence[tuple[int, list[int]]]], alone: bool = False
) -> dict[int, list[Tensor]]:
    """Return the logits of every token of each sequence, its steps one after the other."""
    cache = model.cache()
    pages = {i: [40 * i + 39 - j for j in range(40)] for i in range(7)}  # not consecutive
    done = dict.fromkeys(range(7), 0)
    logits: dict[int, list[Tensor]] = {i: [] for i in range(7)}
    for step in steps:
        chunks = [Chunk(ids, done[i], pages[i]) for i, ids in step]
        groups = [[c] for c in chunks] if alone else [chunks]
        out = torch.cat([model.model.forward(Batch.build(group, all_logits=True), cache) for group in groups])
        for (i, ids), part in zip(step, out.split([len(ids) for _, ids in step]), strict=True):
            logits[i].append(part)
            done[i] += len(ids)
    return logits


def same(first: dict[int, list[Tensor]], second: dict[int, list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for i in first for a, b in zip(first[i], second[i], strict=True))


@needs_native
def test_a_row_has_the_same_bits_in_any_batch(host: Loaded) -> None:
    for _ in range(6):
        steps = random_steps(random.Random(), host.config.vocab_size)
        assert same(run(host, steps), run(host, steps, alone=True))


@needs_native
@pytest.mark.parametrize("overlap", ["off", "ping_pong"])
def test_the_twin_gives_the_bits_of_the_host(folder: Path, host: Loaded, overlap: str) -> None:
    with twin_model(folder, overlap) as twin:
        for _ in range(6):
            steps = random_steps(random.Random(), host.config.vocab_size)
            assert same(run(twin, steps), run(host, steps))


@needs_native
def test_any_timing_gives_the_same_bits(host: Loaded, twin: Loaded) -> None:
    """Operations and experts are late by chance; two halves on the twin, and in turn without an accelerator."""
    chance = random.Random()
    mailbox = twin.model.handoff
    assert isinstance(mailbox, MailboxHandoff)
    own = twin.model.accelerator
    for i, inner in enumerate((own, InlineAccelerator(), own, InlineAccelerator())):
        if i == 2:
            watch(twin.model, lambda name: time.sleep(chance.choice([0.0, chance.random() * 2e-3])))
        twin.model.accelerator = Delayed(inner, chance)
        for _ in range(2):
            steps = random_steps(chance, host.config.vocab_size)
            assert same(run(twin, steps), run(host, steps))


def test_both_halves_get_their_logit_rows(folder: Path) -> None:
    """Chunks without logits, in the first and in the second half."""
    with twin_model(folder) as twin:
        cache = twin.cache()
        for wanted in ([True, False, True], [False, False, True], [True, False, False], [False, False, False]):
            chunks = [Chunk([7 + i] * (i + 1), 0, [i], logits=logits) for i, logits in enumerate(wanted)]
            got = twin.model.forward(Batch.build(chunks), cache)
            assert got.shape == (sum(wanted), twin.config.vocab_size)
            every = twin.model.forward(Batch.build(chunks, all_logits=True), cache)
            assert torch.equal(got, every[[row for row, chunk in zip((0, 2, 5), wanted, strict=True) if chunk]])


# What a step is made of


class Recorder(Accelerator):
    """Write down what is enqueued."""

    name, device = "recorder", torch.device("cpu")

    def __init__(self) -> None:
        self.labels: list[str] = []

    def enqueue(self, op: Callable[[], None], label: Label) -> None:
        self.labels.append(f"{label.name} {label.layer if label.layer is not None else ''}{'AB'[label.half or 0]}")

    def synchronize(self, timeout_s: float | None = None) -> None:
        return

    def abandon(self) -> None:
        return

    def close(self) -> None:
        return


def enqueued(model: Loaded, sequences: int) -> list[str]:
    own, model.model.accelerator = model.model.accelerator, Recorder()
    try:
        model.model.forward(Batch.build([Chunk([1], 0, [i]) for i in range(sequences)]), model.cache())
        return model.model.accelerator.labels
    finally:
        model.model.accelerator = own


def test_the_front_of_one_half_runs_beside_the_experts_of_the_other(twin: Loaded) -> None:
    labels = enqueued(twin, 2)
    assert sorted(set(labels)) == sorted(
        f"{name} {layer}{half}"
        for half in "AB"
        for layer, names in (
            ("", ("embed", "head")),
            *((i, ("front", *(("post", "shared", "take") if i else ()))) for i in range(4)),
        )
        for name in names
    )
    assert len(labels) == len(set(labels))
    place = {label: i for i, label in enumerate(labels)}
    for layer in (1, 2, 3):
        for half, other in ("AB", "BA"):
            steps = [place[f"{name} {layer}{half}"] for name in ("front", "post", "shared", "take")]
            assert steps == sorted(steps)
            if layer < 3 or half == "A":  # something of the other half's is to be done while the experts compute
                later = layer + (half == "B")
                assert steps[1] < place[f"front {later}{other}"] < steps[3]


def test_a_lone_sequence_is_not_cut(twin: Loaded) -> None:
    labels = enqueued(twin, 1)
    assert {label[-1] for label in labels} == {"A"}
    assert labels[:7] == ["embed A", "front 0A", "front 1A", "post 1A", "shared 1A", "take 1A", "front 2A"]


# Errors: each is one of the forward pass, and the next one works


class BoomError(Exception):
    """Not one of ours."""


def works(twin: Loaded, host: Loaded) -> bool:
    steps = random_steps(random.Random(), host.config.vocab_size)
    got, expected = run(twin, steps), run(host, steps)
    return all(torch.allclose(a, b, atol=1e-3) for i in got for a, b in zip(got[i], expected[i], strict=True))


def two(tokens: int = 1) -> Batch:
    return Batch.build([Chunk([3] * tokens, 0, [0, 1, 2, 3]), Chunk([4] * tokens, 0, [4, 5, 6, 7])])


def test_an_operation_that_raises(host: Loaded, folder: Path, twin: Loaded) -> None:
    for model in (twin, host):
        layers = model.model.layers
        for at in range(4):
            whole = layers[at]

            def boom(x: Tensor) -> Tensor:
                raise BoomError

            layers[at] = dataclasses.replace(whole, post_norm=boom, whole=None)
            for _ in range(2):
                with pytest.raises(BoomError):
                    model.model.forward(two(), model.cache())
            layers[at] = whole
            assert works(model, host)


@pytest.mark.parametrize("call", ["submit", "wait", "forward"])
def test_experts_that_raise(host: Loaded, folder: Path, twin: Loaded, call: str) -> None:
    calls = []

    def boom(name: str) -> None:
        if name == call and not calls:
            calls.append(name)
            raise EngineError("experts: expected no such thing, got it")

    with loaded(folder, "host") as inline:
        model = inline if call == "forward" else twin
        watch(model.model, boom, only=2)
        with pytest.raises(EngineError, match=r"layer 2: .*no such thing"):
            model.model.forward(two(), model.cache())
        assert works(model, host)


class Sleeping(QueuedBackend):
    """Compute nothing, late: when `go` is set."""

    def __init__(self, shape: ExpertsShape, queue: ThreadPoolExecutor, go: threading.Event) -> None:
        super().__init__(shape, queue)
        self.go = go

    nbytes = 0  # type: ignore[assignment]

    def load_expert(self, expert: int, weights: Any) -> None:
        return

    def _compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.go.wait(60)
        return torch.zeros(hidden.shape)

    def close(self) -> None:
        return


def test_slow_experts_end_in_an_error_that_names_the_layer(host: Loaded, twin: Loaded) -> None:
    go, own = threading.Event(), twin.model.handoff
    moe = moe_layers(twin.model)
    with ThreadPoolExecutor(1) as queue:
        slow = {i: layer.experts if i != 2 else Sleeping(layer.experts.shape, queue, go) for i, layer in moe.items()}
        twin.model.handoff = SubmitHandoff(slow, TimeLimit(0.2))
        for _ in range(2):
            start = time.monotonic()
            with pytest.raises(EngineError, match=r"layer 2: .*expected a result within 0\.2 s"):
                twin.model.forward(two(), twin.cache())
            assert time.monotonic() - start < 20
        go.set()
    twin.model.handoff = own
    assert works(twin, host)


def test_an_accelerator_that_hangs_is_named(host: Loaded, twin: Loaded) -> None:
    go = threading.Event()
    whole = twin.model.layers[2]

    def hang(x: Tensor) -> Tensor:
        go.wait(60)
        return whole.post_norm(x)

    twin.model._limit = TimeLimit(0.3)
    twin.model.layers[2] = dataclasses.replace(whole, post_norm=hang)
    for _ in range(2):  # the second waits for the first one's operation
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"twin: front, layer 2, half 0: expected an operation to end within 0"):
            twin.model.forward(two(), twin.cache())
        assert time.monotonic() - start < 20
    go.set()
    twin.model._limit = TimeLimit(60)
    twin.model.layers[2] = whole
    assert works(twin, host)


@needs_native
@pytest.mark.parametrize("side", [0, 1])
def test_killed_workers_end_in_an_error_and_so_does_the_next_step(twin: Loaded, side: int) -> None:
    """The threads of the experts, or those of the twin, stop in the middle of a step."""
    calls: list[str] = []

    def kill(name: str) -> None:
        calls.append(name)
        if len(calls) == 2:
            twin.model._runtimes[side].close()

    watch(twin.model, kill)
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(EngineError, match="stopped" if side else r"layer \d: .*stopped"):
            twin.model.forward(two(20), twin.cache())
        assert time.monotonic() - start < 20


@pytest.mark.parametrize("inline", [True, False])
def test_an_interrupt_leaves_everything_usable(host: Loaded, folder: Path, twin: Loaded, inline: bool) -> None:
    with loaded(folder, "host") as other:
        model = other if inline else twin
        interrupted = []

        def interrupt(name: str) -> None:
            if not interrupted and name in ("wait", "forward"):
                interrupted.append(name)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)

        watch(model.model, interrupt)
        for _ in range(3):
            interrupted.clear()
            with pytest.raises(KeyboardInterrupt):
                model.model.forward(two(), model.cache())
            assert works(model, host)


class WatchedBehind(Watched):
    """Look at both ends of a call."""

    def submit(self, slot: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        super().submit(slot, hidden, ids, weights)
        self.before("submitted")

    def wait(self, slot: int, timeout_s: float | None = None) -> Tensor:
        result = super().wait(slot, timeout_s)
        self.before("waited")
        return result


@pytest.mark.parametrize("at", ["submit", "submitted", "wait", "waited"])
def test_an_interrupt_around_experts_beside_the_calling_thread(host: Loaded, folder: Path, at: str) -> None:
    """As with a GPU, whose operations the calling thread launches: the slots of the experts are free again."""
    interrupted: list[str] = []

    def interrupt(name: str) -> None:
        if name == at and not interrupted:
            interrupted.append(name)
            raise KeyboardInterrupt

    with loaded(folder, "host", overlap="ping_pong") as inline:
        experts: dict[int, ExpertsBackend] = {i: moe.experts for i, moe in moe_layers(inline.model).items()}
        inline.model.handoff = SubmitHandoff({**experts, 2: WatchedBehind(experts[2], interrupt)})
        for _ in range(3):
            interrupted.clear()
            with pytest.raises(KeyboardInterrupt):
                inline.model.forward(two(), inline.cache())
            assert works(inline, host)
        for slot in range(2):
            with pytest.raises(ValueError, match="in flight"):
                experts[2].wait(slot, 0.0)


def test_an_interrupt_while_operations_are_enqueued(host: Loaded, twin: Loaded) -> None:
    own = twin.model.accelerator

    class Interrupted(Delayed):
        at: tuple[str, int | None, int] | None = None

        def enqueue(self, op: Callable[[], None], label: Label) -> None:
            super().enqueue(op, label)
            if (label.name, label.layer, label.half) == self.at:
                raise KeyboardInterrupt

    for at in (("embed", None, 0), ("post", 1, 0), ("post", 2, 1), ("shared", 3, 1), ("head", None, 1)):
        twin.model.accelerator = interrupted = Interrupted(own, random.Random())
        interrupted.at = at
        with pytest.raises(KeyboardInterrupt):
            twin.model.forward(two(), twin.cache())
        twin.model.accelerator = own
        assert works(twin, host)


def test_closing_ends_the_threads_of_the_twin(folder: Path) -> None:
    before = set(threading.enumerate())
    with twin_model(folder) as twin:
        twin.model.forward(two(), twin.cache())
        assert len(set(threading.enumerate()) - before) >= 1
    assert set(threading.enumerate()) == before


def test_an_engine_writes_its_trace_when_it_is_closed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for rules in ("twin", "host"):
        with Engine.load(folder, rules, trace=path) as engine:
            engine.logits([1, 2, 3])
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
        assert {event["args"]["layer"] for event in events if event["name"] == "take"} == {1, 2, 3}
        assert sum(event["cat"] == "experts" for event in events) == 3 or NATIVE_ERROR is not None
    with pytest.raises(ConfigError, match="expected a trace file that can be written, got No such file or directory"):
        Engine.load(folder, "host", trace=tmp_path / "nowhere" / "trace.json")

"""The hand-off by submit and wait: results, slots, late and failing experts; from the host twin, too."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hybrid_k2.accelerator import HostTwin, Label, SubmitHandoff, TimeLimit, Trace
from hybrid_k2.errors import EngineError
from hybrid_k2.experts import ExpertsBackend, ExpertsRuntime
from hybrid_k2.experts.numba_backend import NumbaRuntime
from hybrid_k2.experts.reference import ReferenceExperts, ReferenceRuntime
from tests.unit.experts_common import load_random_experts, native_runtime, random_routing
from tests.unit.handoff_steps import check_step

HIDDEN, EXPERTS, TOP_K = 96, 6, 3


@pytest.fixture(params=["native", "numba", "reference"])
def runtime(request: pytest.FixtureRequest) -> Iterator[ExpertsRuntime]:
    kinds = {"native": native_runtime, "numba": lambda: NumbaRuntime(1), "reference": ReferenceRuntime}
    opened = kinds[request.param]()
    yield opened
    opened.close()


@pytest.fixture
def layers(runtime: ExpertsRuntime) -> dict[int, ExpertsBackend]:
    """Layers 1 and 2 of a model."""
    made = {number: runtime.make_layer(HIDDEN, 64, EXPERTS, TOP_K) for number in (1, 2)}
    for layer in made.values():
        load_random_experts(layer)
    return made


@pytest.fixture
def twin() -> Iterator[HostTwin]:
    twin = HostTwin()
    yield twin
    twin.close()


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(tokens, HIDDEN), *random_routing(tokens, EXPERTS, TOP_K))


def test_two_slots_from_the_twin_give_what_forward_gives(layers: dict[int, ExpertsBackend], twin: HostTwin) -> None:
    handoff = SubmitHandoff(layers)
    handoff.trace = Trace()
    assert len(layers) == 2
    for _ in range(5):
        check_step(twin, handoff, layers, [batch(5), batch(1)])
    waits = [event.label for event in handoff.trace.events if event.label.lane == "waits"]
    assert waits[:2] == [Label("wait", 1, half, "waits") for half in range(2)]


def test_the_trace_shows_when_the_experts_computed(layers: dict[int, ExpertsBackend], twin: HostTwin) -> None:
    handoff = SubmitHandoff(layers)
    handoff.trace = trace = Trace()
    before = time.monotonic_ns()
    for _ in range(3):
        check_step(twin, handoff, layers, [batch(5), batch(1)])
    after = time.monotonic_ns()
    lanes = {name: [event for event in trace.events if event.label.lane == name] for name in ("waits", "experts")}
    if layers[1].computed(0) is None:  # the native experts keep no times: with them, a mailbox hands over
        assert lanes["experts"] == []
        return
    assert [event.label for event in lanes["experts"]] == [
        Label("experts", event.label.layer, event.label.half, "experts") for event in lanes["waits"]
    ]
    for wait, computed in zip(lanes["waits"], lanes["experts"], strict=True):
        assert before <= computed.start_ns < computed.stop_ns <= wait.stop_ns <= after
    starts = [event.start_ns for event in lanes["experts"]]
    assert starts == sorted(starts), "one computation after the other"


def test_slots_and_layers_are_checked(layers: dict[int, ExpertsBackend]) -> None:
    handoff = SubmitHandoff(layers)
    with pytest.raises(ValueError, match="slot 0: expected it to hold layer 1, got nothing"):
        handoff.take(0, 1)
    handoff.post(0, 1, *batch(2))
    with pytest.raises(ValueError, match="slot 0: expected a free one, got one that holds layer 1"):
        handoff.post(0, 2, *batch(2))
    with pytest.raises(ValueError, match="slot 0: expected it to hold layer 2, got layer 1"):
        handoff.take(0, 2)
    with pytest.raises(ValueError, match="slot: expected"):
        handoff.post(2, 1, *batch(2))
    with pytest.raises(EngineError, match="layer 9: expected a layer with experts"):
        handoff.post(1, 9, *batch(2))
    assert handoff.take(0, 1).shape == (2, HIDDEN)
    handoff.post(1, 2, *batch(0))
    assert handoff.take(1, 2).shape == (0, HIDDEN)
    handoff.close()
    with pytest.raises(EngineError, match="hand-off: expected an open one, got a closed one"):
        handoff.post(0, 1, *batch(2))


def test_a_failing_computation_names_the_layer_and_the_next_step_works(runtime: ExpertsRuntime) -> None:
    layers = {number: runtime.make_layer(HIDDEN, 64, EXPERTS, TOP_K) for number in (1, 2)}
    load_random_experts(layers[1])  # layer 2 has none
    handoff = SubmitHandoff(layers)
    hidden, ids, weights = batch(3)

    def use() -> None:
        handoff.post(0, 2, hidden, ids, weights)
        handoff.take(0, 2)

    with pytest.raises(EngineError, match=r"layer 2: .*expected it to be loaded"):
        use()
    handoff.reset()
    handoff.post(0, 1, hidden, ids, weights)
    assert torch.equal(handoff.take(0, 1), layers[1].forward(hidden, ids, weights))


class SlowExperts(ReferenceExperts):
    """Compute when they are let, or fail."""

    gate: threading.Event
    failure: Exception | None = None

    def _compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.gate.wait(60)
        if self.failure is not None:
            raise self.failure
        return super()._compute(hidden, ids, weights)


@pytest.fixture
def slow() -> Iterator[SlowExperts]:
    runtime = ReferenceRuntime()
    layer = runtime.make_layer(HIDDEN, 64, EXPERTS, TOP_K)
    layer.__class__ = SlowExperts
    assert isinstance(layer, SlowExperts)
    layer.gate = threading.Event()
    load_random_experts(layer)
    yield layer
    layer.gate.set()
    runtime.close()


def test_a_slow_computation_is_an_error_in_time_and_the_next_step_works(slow: SlowExperts, twin: HostTwin) -> None:
    impatient, patient = SubmitHandoff({7: slow}, TimeLimit(0.05)), SubmitHandoff({7: slow})
    arguments = batch(3)
    results: list[Tensor] = []

    def enqueue(handoff: SubmitHandoff) -> None:
        twin.enqueue(lambda: handoff.post(1, 7, *arguments), Label("post", 7))
        twin.enqueue(lambda: results.append(handoff.take(1, 7)), Label("take", 7))

    enqueue(impatient)
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"layer 7: experts, slot 1: expected a result within 0\.05 s, got none"):
        twin.synchronize(timeout_s=60)
    assert time.monotonic() - start < 10
    assert results == []
    slow.gate.set()
    twin.enqueue(impatient.reset, Label("reset"))
    enqueue(patient)  # through the same slot of the experts
    twin.synchronize(timeout_s=60)
    assert torch.equal(results[0], slow.forward(*arguments))


def test_a_failure_while_computing_names_the_layer(slow: SlowExperts) -> None:
    slow.failure = EngineError("expert 3: expected sound weights, got damaged ones", hint="load the model again")
    slow.gate.set()
    handoff = SubmitHandoff({7: slow})
    handoff.post(0, 7, *batch(1))
    with pytest.raises(EngineError, match="layer 7: expert 3: expected sound weights") as caught:
        handoff.take(0, 7)
    assert caught.value.hint == "load the model again"
    slow.failure = None
    handoff.reset()
    handoff.post(0, 7, *batch(1))
    assert handoff.take(0, 7).shape == (1, HIDDEN)


def test_reset_says_that_native_experts_do_not_end_and_can_be_repeated() -> None:
    layer = native_runtime().make_layer(512, 512, 4, 4)
    load_random_experts(layer)
    handoff = SubmitHandoff({3: layer}, TimeLimit(0.001))
    handoff.post(0, 3, torch.randn(2048, 512), *random_routing(2048, 4, 4))
    for use in (lambda: handoff.take(0, 3), handoff.reset):
        with pytest.raises(EngineError, match=r"layer 3: experts, slot 0: expected a result within"):
            use()
    deadline = time.monotonic() + 60
    while True:
        try:
            handoff.reset()
            break
        except EngineError:
            assert time.monotonic() < deadline
    handoff.post(0, 3, torch.randn(1, 512), *random_routing(1, 4, 4))

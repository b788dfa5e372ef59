"""The accelerator and the hand-off on a card; without one, the error that says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hybrid_k2.accelerator import Label, Trace, handoff_cuda
from hybrid_k2.accelerator.cuda import CudaAccelerator
from hybrid_k2.accelerator.handoff_cuda import CudaHandoff
from hybrid_k2.errors import EngineError, HardwareError
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.experts.cpu import NativeExperts
from tests.unit.experts_common import load_random_experts, native_runtime, random_routing

HIDDEN, EXPERTS, TOP_K, ROOM = 96, 6, 3, 32
LABEL = Label("front", layer=3, half=1)


def test_a_card_that_is_not_there_is_an_error() -> None:
    missing = torch.device("cuda", torch.cuda.device_count())
    with pytest.raises(HardwareError, match=f"{missing}: expected a CUDA device, got {torch.cuda.device_count()}"):
        CudaAccelerator(missing)


class Lane:
    """In the place of a stream and its events: `dry` says whether what was launched has run."""

    dry = True

    def __init__(self, *_: object, **options: object) -> None:
        pass

    def query(self) -> bool:
        return self.dry

    def record(self, stream: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass


class Watched:
    """A peer that keeps awake while a step runs."""

    awake = False
    failure: EngineError | None = None
    answers = 0  # that are still to come

    def begin(self) -> None:
        self.awake = True

    def progress(self) -> object:
        self.answers = max(0, self.answers - 1)
        return self.answers

    def waiting(self) -> str | None:
        return None if self.answers else "no answer from the experts of layer 7"

    def release(self) -> None:
        Lane.dry = True

    def end(self) -> None:
        if self.failure is not None:
            raise self.failure

    def rest(self) -> None:
        self.awake = False


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(Lane, "dry", True)
    for name, stand_in in (
        ("is_available", lambda: True), ("device_count", lambda: 1), ("Stream", Lane), ("Event", Lane),
        ("default_stream", Lane), ("stream", lambda _: nullcontext()), ("is_current_stream_capturing", lambda: False),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return Watched()


def test_peers_rest_after_a_step_however_it_ends(peer: Watched) -> None:
    accelerator = CudaAccelerator(torch.device("cuda:0"))
    accelerator.attach(peer)

    def fail() -> None:
        raise ValueError("an operation")

    def step(op: Callable[[], None], timeout_s: float) -> None:
        try:
            accelerator.enqueue(op, LABEL)
            assert peer.awake
            accelerator.synchronize(timeout_s)
        except BaseException:
            accelerator.abandon()
            raise

    step(lambda: None, 60)
    assert not peer.awake
    with pytest.raises(ValueError, match="an operation"):
        step(fail, 60)
    assert not peer.awake
    peer.failure = EngineError("the experts")
    with pytest.raises(EngineError, match="the experts"):
        step(lambda: None, 60)
    assert not peer.awake
    Lane.dry = False  # what was launched waits until it is let go
    with pytest.raises(EngineError, match="expected an operation to end within"):
        step(lambda: None, 0.01)
    assert not peer.awake


def test_a_graph_has_the_time_limit_of_each_thing_that_it_asks_for(peer: Watched) -> None:
    accelerator = CudaAccelerator(torch.device("cuda:0"))
    accelerator.attach(peer)
    accelerator.enqueue(lambda: None, Label("graph"))
    Lane.dry, peer.answers = False, 400
    with pytest.raises(EngineError, match=r"graph: expected .* 0\.01 s, got none; no answer .* of layer 7$"):
        accelerator.synchronize(0.01)
    assert peer.answers == 0


def test_a_hand_off_knows_which_experts_have_not_answered() -> None:
    handoff = object.__new__(CudaHandoff)
    flags = [(torch.tensor([5, 17, 2, 1]), torch.tensor([5, 0])), (torch.tensor([9, 18, 2, 1]), torch.tensor([8, 0]))]
    handoff._memory = [SimpleNamespace(request=request, reply=reply) for request, reply in flags]  # type: ignore[misc]
    assert handoff.waiting() == "no answer from the experts of layer 18"
    before = handoff.progress()
    assert before == handoff.progress()
    flags[0][0][0] = 6  # asked again
    assert handoff.progress() != before
    assert handoff.waiting() == "no answer from the experts of layer 17 and 18"
    flags[0][1][0], flags[1][1][0] = 6, 9
    assert handoff.waiting() is None


def test_a_peer_stays_awake_while_an_abandoned_step_still_runs(peer: Watched) -> None:
    accelerator = CudaAccelerator(torch.device("cuda:0"))
    accelerator.attach(peer)
    accelerator.enqueue(lambda: None, LABEL)
    Lane.dry = False
    accelerator.abandon()
    assert peer.awake, "kernels that run may wait for it"
    accelerator.enqueue(lambda: None, LABEL)
    Lane.dry = True
    accelerator.synchronize(60)
    assert not peer.awake


@pytest.fixture(params=["kernels", "host calls"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to speak the mailbox's protocol."""
    if request.param == "host calls":
        monkeypatch.setattr(handoff_cuda, "have_triton", lambda: False)


@pytest.fixture
def accelerator(card: torch.device) -> Iterator[CudaAccelerator]:
    made = CudaAccelerator(torch.device("cuda:0"))
    yield made
    made.close()


@pytest.fixture
def runtime() -> Iterator[ExpertsRuntime]:
    opened = native_runtime(threads=2)
    yield opened
    opened.close()


def make_layer(runtime: ExpertsRuntime, hidden: int = HIDDEN, loaded: bool = True) -> NativeExperts:
    layer = runtime.make_layer(hidden, 64, EXPERTS, TOP_K)
    assert isinstance(layer, NativeExperts)
    if loaded:
        load_random_experts(layer)
    return layer


def batch(tokens: int, dtype: torch.dtype = torch.bfloat16, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(tokens, hidden).to(dtype), *random_routing(tokens, EXPERTS, TOP_K))


@pytest.mark.gpu
def test_operations_run_in_order_and_are_traced(accelerator: CudaAccelerator) -> None:
    accelerator.trace = trace = Trace()
    x = torch.zeros(1000, device=accelerator.device)
    before = time.monotonic_ns()
    for i in range(5):
        accelerator.enqueue(lambda i=i: x.mul_(2).add_(i), Label("front", layer=i))
    accelerator.synchronize(timeout_s=60)
    after = time.monotonic_ns()
    assert bool((x == 26).all())
    assert [event.label.layer for event in trace.events] == list(range(5))
    edges = [edge for event in trace.events for edge in (event.start_ns, event.stop_ns)]
    assert edges == sorted(edges)
    assert before <= edges[0]
    assert edges[-1] <= after + 1_000_000


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_slots_give_what_forward_gives(
    calls: None, accelerator: CudaAccelerator, runtime: ExpertsRuntime, dtype: torch.dtype
) -> None:
    layers = {number: make_layer(runtime) for number in (1, 2)}
    handoff = CudaHandoff(accelerator, runtime.native, layers, ROOM)
    handoff.trace = Trace()
    results: list[Tensor] = []
    expected: list[Tensor] = []
    for tokens in (1, ROOM, 7):
        halves = [batch(tokens, dtype), batch(1, dtype)]
        on_card = [[tensor.to(accelerator.device) for tensor in half] for half in halves]
        for layer, experts in layers.items():
            for half in range(2):
                expected.append(experts.forward(*halves[half]))
                accelerator.enqueue(
                    lambda half=half, layer=layer, arguments=on_card[half]: handoff.post(half, layer, *arguments),
                    Label("post", layer, half),
                )
            for half in range(2):
                accelerator.enqueue(
                    lambda half=half, layer=layer: results.append(handoff.take(half, layer)), Label("take", layer, half)
                )
        accelerator.synchronize(timeout_s=60)
    assert all(torch.equal(got.cpu(), want) for got, want in zip(results, expected, strict=True))
    assert sum(event.label.lane == "experts" for event in handoff.trace.events) == 12
    handoff.close()


@pytest.mark.gpu
def test_a_failure_names_the_layer_and_the_next_step_works(
    calls: None, accelerator: CudaAccelerator, runtime: ExpertsRuntime
) -> None:
    good = make_layer(runtime)
    handoff = CudaHandoff(accelerator, runtime.native, {1: good, 9: make_layer(runtime, loaded=False)}, ROOM)
    arguments = batch(3)
    on_card = [tensor.to(accelerator.device) for tensor in arguments]
    results: list[Tensor] = []

    def step(layer: int) -> None:
        accelerator.enqueue(lambda: handoff.post(0, layer, *on_card), Label("post", layer, 0))
        accelerator.enqueue(lambda: results.append(handoff.take(0, layer)), Label("take", layer, 0))
        accelerator.synchronize(timeout_s=60)

    with pytest.raises(EngineError, match=r"layer 9: .*expected it to be loaded"):
        step(9)
    accelerator.enqueue(handoff.reset, Label("reset"))
    step(1)
    assert torch.equal(results[-1].cpu(), good.forward(*arguments))
    handoff.close()


@pytest.mark.gpu
def test_slow_experts_let_the_card_go_and_the_next_step_works(
    calls: None, accelerator: CudaAccelerator, runtime: ExpertsRuntime
) -> None:
    """No hang: the kernels that wait are let go, also those launched behind them."""
    room = 1 << 15
    layer = make_layer(runtime, hidden=512)
    handoff = CudaHandoff(accelerator, runtime.native, {17: layer}, room)
    slow = [tensor.to(accelerator.device) for tensor in batch(room, hidden=512)]
    for _ in range(2):
        accelerator.enqueue(lambda: handoff.post(0, 17, *slow), Label("post", 17, 0))
        accelerator.enqueue(lambda: handoff.take(0, 17), Label("take", 17, 0))
    start = time.monotonic()
    with pytest.raises(EngineError, match="take, layer 17, half 0: expected an operation to end within"):
        accelerator.synchronize(timeout_s=0.02)
    assert time.monotonic() - start < 10
    few = batch(2, hidden=512)
    on_card = [tensor.to(accelerator.device) for tensor in few]
    results: list[Tensor] = []
    accelerator.enqueue(handoff.reset, Label("reset"))
    accelerator.enqueue(lambda: handoff.post(0, 17, *on_card), Label("post", 17, 0))
    accelerator.enqueue(lambda: results.append(handoff.take(0, 17)), Label("take", 17, 0))
    accelerator.synchronize(timeout_s=60)
    assert torch.equal(results[0].cpu(), layer.forward(*few))
    handoff.close()


@pytest.mark.gpu
def test_a_captured_post_takes_a_new_ticket_at_each_replay(
    accelerator: CudaAccelerator, runtime: ExpertsRuntime
) -> None:
    layer = make_layer(runtime)
    handoff = CudaHandoff(accelerator, runtime.native, {1: layer}, ROOM)
    static = [tensor.to(accelerator.device) for tensor in batch(4)]
    results: list[Tensor] = []

    def op() -> None:
        handoff.post(0, 1, *static)
        results.append(handoff.take(0, 1))

    accelerator.enqueue(op, LABEL)  # compiles the kernels
    accelerator.synchronize(timeout_s=60)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=accelerator.stream):
        op()
    for _ in range(3):
        fresh = batch(4)
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        torch.cuda.synchronize()
        accelerator.enqueue(graph.replay, LABEL)
        accelerator.synchronize(timeout_s=60)
        assert torch.equal(results[-1].cpu(), layer.forward(*fresh))
    handoff.close()

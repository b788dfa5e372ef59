"""Two computations in flight, time limits, interrupts, and closing."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybrid_k2.errors import EngineError
from hybrid_k2.experts import ExpertsBackend, ExpertsRuntime
from hybrid_k2.experts.numba_backend import NumbaRuntime
from hybrid_k2.experts.reference import ReferenceRuntime
from tests.conftest import REPO
from tests.unit.experts_common import load_random_experts, native_layer, native_runtime, random_routing


@pytest.fixture(params=["native", "numba", "reference"])
def runtime(request: pytest.FixtureRequest) -> Iterator[ExpertsRuntime]:
    """One of each kind of backend."""
    kinds = {"native": native_runtime, "numba": lambda: NumbaRuntime(1), "reference": ReferenceRuntime}
    opened = kinds[request.param]()
    yield opened
    opened.close()


@pytest.fixture
def layer(runtime: ExpertsRuntime) -> ExpertsBackend:
    """A small layer with random experts."""
    made = runtime.make_layer(96, 64, 6, 3)
    load_random_experts(made)
    return made


def arguments(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random batch for the small layer."""
    return (torch.randn(tokens, 96), *random_routing(tokens, 6, 3))


def test_two_slots_give_what_forward_gives(layer: ExpertsBackend) -> None:
    for _ in range(20):
        first, second = arguments(5), arguments(1)
        layer.submit(0, *first)
        layer.submit(1, *second)
        assert torch.equal(layer.wait(1), layer.forward(*second))
        assert torch.equal(layer.wait(0, timeout_s=60), layer.forward(*first))


def test_two_layers_of_a_runtime_are_in_flight_together(runtime: ExpertsRuntime) -> None:
    layers = [runtime.make_layer(96, 64, 6, 3) for _ in range(2)]
    for layer in layers:
        load_random_experts(layer)
    batch = arguments(4)
    for layer in layers:
        layer.submit(0, *batch)
    for layer in reversed(layers):
        assert torch.equal(layer.wait(0), layer.forward(*batch))


def test_submit_copies_its_arguments(layer: ExpertsBackend) -> None:
    hidden, ids, weights = arguments(64)
    expected = layer.forward(hidden, ids, weights)
    layer.submit(0, hidden, ids, weights)
    hidden.zero_()
    ids.zero_()
    weights.zero_()
    assert torch.equal(layer.wait(0), expected)


def test_an_empty_batch_can_be_submitted(layer: ExpertsBackend) -> None:
    layer.submit(1, *arguments(0))
    assert layer.wait(1).shape == (0, 96)


def test_slots_are_checked(layer: ExpertsBackend) -> None:
    batch = arguments(2)
    for slot in (-1, 2):
        with pytest.raises(ValueError, match=rf"slot: expected 0\.\.1, got {slot}"):
            layer.submit(slot, *batch)
        with pytest.raises(ValueError, match=rf"slot: expected 0\.\.1, got {slot}"):
            layer.wait(slot)
    with pytest.raises(ValueError, match="nothing was submitted"):
        layer.wait(0)
    layer.submit(0, *batch)
    with pytest.raises(ValueError, match="in flight"):
        layer.submit(0, *batch)
    layer.wait(0)
    layer.submit(0, *batch)
    layer.wait(0)


def test_threads_can_call_forward_at_once(layer: ExpertsBackend) -> None:
    batches = [arguments(tokens) for tokens in (1, 7, 33)]
    expected = [layer.forward(*batch) for batch in batches]
    equal: list[bool] = []

    def call(index: int) -> None:
        equal.extend(torch.equal(layer.forward(*batches[index]), expected[index]) for _ in range(20))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 60


def heavy_layer(threads: int = 2) -> tuple[ExpertsBackend, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A batch that keeps two threads busy for at least tens of milliseconds, whatever the instruction set."""
    layer = native_layer(512, 512, 4, 4, threads)
    load_random_experts(layer)
    return layer, (torch.randn(1024, 512), *random_routing(1024, 4, 4))


def test_wait_ends_at_its_time_limit_and_can_be_repeated() -> None:
    layer, batch = heavy_layer()
    with pytest.raises(EngineError, match=r"slot 0: expected a result within 0\.001 s, got none"):  # noqa: PT012
        for _ in range(100):  # on a busy machine the experts may be done before this thread has its turn again
            layer.submit(0, *batch)
            layer.wait(0, timeout_s=0.001)
    with pytest.raises(ValueError, match="in flight"):
        layer.submit(0, *batch)
    assert bool(layer.wait(0).isfinite().all())
    with pytest.raises(ValueError, match="timeout_s: expected at least 0, got -1"):
        layer.wait(0, timeout_s=-1)


def test_the_calling_thread_is_free_while_the_experts_compute() -> None:
    layer, batch = heavy_layer()
    layer.forward(*batch)

    def submits_at_once() -> bool:
        start = time.perf_counter()
        layer.submit(0, *batch)
        submitted = time.perf_counter()
        layer.wait(0)
        return submitted - start < time.perf_counter() - submitted

    assert any(submits_at_once() for _ in range(100))  # a busy machine may take the caller's turn from it


def test_an_interrupt_ends_forward_and_the_layer_goes_on() -> None:
    layer, (hidden, ids, weights) = heavy_layer()
    many = (hidden.repeat(40, 1), ids.repeat(40, 1), weights.repeat(40, 1))
    timer = threading.Timer(0.1, _thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        timer.start()
        for _ in range(100):  # the timer's thread may be late
            layer.forward(*many)
    timer.join()
    assert bool(layer.forward(hidden[:2], ids[:2], weights[:2]).isfinite().all())


def expert_threads() -> list[str]:
    """Names of this process's native expert threads."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if name.startswith("k2-expert")]


def test_close_leaves_no_thread_even_with_work_in_flight() -> None:
    before = len(expert_threads())
    runtime = native_runtime(threads=3)
    layer = runtime.make_layer(256, 256, 4, 4)
    load_random_experts(layer)
    layer.submit(0, torch.randn(500, 256), *random_routing(500, 4, 4))
    assert len(expert_threads()) == before + 3
    runtime.close()
    assert len(expert_threads()) == before
    with pytest.raises(EngineError, match="stopped"):
        layer.forward(torch.randn(1, 256), *random_routing(1, 4, 4))
    layer.close()
    runtime.close()


def test_close_from_several_threads() -> None:
    before = len(expert_threads())
    runtime = native_runtime(threads=3)
    closers = [threading.Thread(target=runtime.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
    assert len(expert_threads()) == before


def test_threads_that_share_a_slot_never_lose_a_computation() -> None:
    """Each submit takes the slot or is refused, and what is waited for is one of the two batches."""
    layer = native_layer(96, 64, 6, 3)
    load_random_experts(layer)
    batches = [arguments(3), arguments(3)]
    expected = [layer.forward(*batch) for batch in batches]
    strange: list[object] = []

    def use(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        for _ in range(150):
            try:
                layer.submit(0, *batch)
            except ValueError as error:
                strange.extend([error] if "in flight" not in str(error) else [])
            try:
                result = layer.wait(0)
            except ValueError as error:
                strange.extend([error] if "nothing was submitted" not in str(error) else [])
            else:
                strange.extend([result] if not any(torch.equal(result, one) for one in expected) else [])

    users = [threading.Thread(target=use, args=(batch,)) for batch in batches]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert strange == []


def test_a_closed_layer_says_so() -> None:
    layer = native_layer(64, 32, 2, 1)
    load_random_experts(layer)
    layer.submit(0, torch.randn(9, 64), *random_routing(9, 2, 1))
    layer.close()
    layer.close()
    with pytest.raises(EngineError, match="closed"):
        layer.wait(0)
    with pytest.raises(EngineError, match="closed"):
        layer.forward(torch.randn(1, 64), *random_routing(1, 2, 1))


def test_close_while_other_threads_wait() -> None:
    """The waiters get their result or an EngineError; the process lives."""
    for _ in range(150):
        layer = native_layer(96, 64, 6, 3)
        load_random_experts(layer)
        outcomes: list[object] = []

        def wait(slot: int, layer: ExpertsBackend = layer, outcomes: list[object] = outcomes) -> None:
            try:
                outcomes.append(layer.wait(slot))
            except (EngineError, ValueError) as error:
                outcomes.append(error)

        for slot in (0, 1):
            layer.submit(slot, *arguments(40))
        waiters = [threading.Thread(target=wait, args=(slot,)) for slot in (0, 1)]
        for waiter in waiters:
            waiter.start()
        layer.close()
        for waiter in waiters:
            waiter.join()
        assert len(outcomes) == 2


def test_an_exception_of_the_computation_reaches_wait() -> None:
    runtime = ReferenceRuntime()
    layer = runtime.make_layer(64, 32, 2, 1)
    layer.submit(0, torch.randn(1, 64), *random_routing(1, 2, 1))  # no expert was loaded
    with pytest.raises(EngineError, match="expected it to be loaded"):
        layer.wait(0)
    with pytest.raises(ValueError, match="nothing was submitted"):
        layer.wait(0)
    runtime.close()


def test_a_process_that_closes_nothing_still_ends() -> None:
    script = (
        "import torch; from tests.unit.experts_common import *\n"
        "layer = native_layer(256, 256, 4, 4); load_random_experts(layer)\n"
        "layer.submit(0, torch.randn(2000, 256), *random_routing(2000, 4, 4))\n"
    )
    native_runtime().close()
    result = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, b"")

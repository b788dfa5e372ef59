"""The hand-off through the mailbox: results, slots, late, failing and dead experts; from the host twin, too."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_k2.accelerator import HostTwin, Label, MailboxHandoff, TimeLimit, Trace
from hybrid_k2.errors import EngineError
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.native import native
from tests.conftest import REPO
from tests.unit.experts_common import load_random_experts, native_runtime, random_routing
from tests.unit.handoff_steps import check_step

HIDDEN, EXPERTS, TOP_K = 96, 6, 3
Arguments = tuple[Tensor, Tensor, Tensor]


def make_layers(runtime: ExpertsRuntime, numbers: tuple[int, ...] = (1, 2)) -> dict[int, NativeExperts]:
    layers = {}
    for number in numbers:
        layer = runtime.make_layer(HIDDEN, 64, EXPERTS, TOP_K)
        assert isinstance(layer, NativeExperts)
        load_random_experts(layer)
        layers[number] = layer
    return layers


@pytest.fixture
def runtime() -> Iterator[ExpertsRuntime]:
    opened = native_runtime()
    yield opened
    opened.close()


@pytest.fixture
def layers(runtime: ExpertsRuntime) -> dict[int, NativeExperts]:
    """Layers 1 and 2 of a model."""
    return make_layers(runtime)


@pytest.fixture
def handoff(runtime: ExpertsRuntime, layers: dict[int, NativeExperts]) -> Iterator[MailboxHandoff]:
    opened = MailboxHandoff(runtime.native, layers, tokens=4)
    yield opened
    opened.close()


@pytest.fixture
def twin() -> Iterator[HostTwin]:
    twin = HostTwin()
    yield twin
    twin.close()


def batch(tokens: int, dtype: torch.dtype = torch.float32) -> Arguments:
    return (torch.randn(tokens, HIDDEN).to(dtype), *random_routing(tokens, EXPERTS, TOP_K))


def server_threads() -> int:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("k2-server")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_slots_from_the_twin_give_what_forward_gives(
    handoff: MailboxHandoff, layers: dict[int, NativeExperts], twin: HostTwin, dtype: torch.dtype
) -> None:
    assert len(layers) == 2
    for tokens in (3, 1, 0, 37, 2):
        check_step(twin, handoff, layers, [batch(tokens, dtype), batch(1 + tokens, dtype)])


def test_the_trace_shows_waits_and_experts(handoff: MailboxHandoff) -> None:
    handoff.trace = trace = Trace()
    before = time.monotonic_ns()
    for layer in (1, 2):
        handoff.post(0, layer, *batch(5))
        handoff.post(1, layer, *batch(5))
        for slot in (1, 0):
            handoff.take(slot, layer)
    after = time.monotonic_ns()
    experts = [event for event in trace.events if event.label.lane == "experts"]
    assert [(event.label.layer, event.label.half) for event in experts] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    edges = [before, *(edge for event in experts for edge in (event.start_ns, event.stop_ns)), after]
    assert edges == sorted(edges)
    waits = [event.label for event in trace.events if event.label.lane == "waits"]
    assert waits == [Label("wait", layer, slot, "waits") for layer in (1, 2) for slot in (1, 0)]
    handoff.trace = None
    handoff.post(0, 1, *batch(5))
    handoff.take(0, 1)
    assert len(trace.events) == 8


def test_slots_layers_and_arguments_are_checked(handoff: MailboxHandoff, layers: dict[int, NativeExperts]) -> None:
    hidden, ids, weights = batch(2)
    for slot in (-1, 2):
        with pytest.raises(ValueError, match=r"slot: expected 0\.\.1"):
            handoff.post(slot, 1, hidden, ids, weights)
        with pytest.raises(ValueError, match=r"slot: expected 0\.\.1"):
            handoff.take(slot, 1)
    with pytest.raises(EngineError, match="layer 3: expected a layer with experts"):
        handoff.post(0, 3, hidden, ids, weights)
    with pytest.raises(ValueError, match="slot 0: expected it to hold layer 1, got nothing"):
        handoff.take(0, 1)
    for wrong in (
        (hidden[:1], ids, weights),
        (hidden, ids[:, :2], weights),
        (hidden, ids.long(), weights),
        (hidden, ids, weights.double()),
        (hidden[:, :-1], ids, weights),
    ):
        with pytest.raises(ValueError, match="expected"):
            handoff.post(0, 1, *wrong)
    handoff.post(0, 1, hidden, ids, weights)
    with pytest.raises(ValueError, match="slot 0: expected a free one, got one that holds layer 1"):
        handoff.post(0, 2, hidden, ids, weights)
    with pytest.raises(ValueError, match="slot 0: expected it to hold layer 2, got layer 1"):
        handoff.take(0, 2)
    assert torch.equal(handoff.take(0, 1), layers[1].forward(hidden, ids, weights))


def test_layers_of_another_runtime_or_width_are_refused(
    runtime: ExpertsRuntime, layers: dict[int, NativeExperts]
) -> None:
    other = native_runtime(threads=1)
    with pytest.raises(ValueError, match="layers of one runtime, got layer 2"):
        MailboxHandoff(runtime.native, {1: layers[1], 2: other.make_layer(HIDDEN, 64, EXPERTS, TOP_K)})
    other.close()
    wide = runtime.make_layer(2 * HIDDEN, 64, EXPERTS, TOP_K)
    with pytest.raises(ValueError, match="96 channels and 3 experts per token, got layer 2"):
        MailboxHandoff(runtime.native, {1: layers[1], 2: wide})


def test_post_copies_its_arguments(handoff: MailboxHandoff, layers: dict[int, NativeExperts]) -> None:
    arguments = batch(50)
    expected = layers[1].forward(*arguments)
    handoff.post(0, 1, *arguments)
    for tensor in arguments:
        tensor.zero_()
    assert torch.equal(handoff.take(0, 1), expected)


def test_failing_experts_name_the_layer_and_the_next_step_works(
    runtime: ExpertsRuntime, layers: dict[int, NativeExperts], twin: HostTwin
) -> None:
    empty = runtime.make_layer(HIDDEN, 64, EXPERTS, TOP_K)
    assert isinstance(empty, NativeExperts)
    handoff = MailboxHandoff(runtime.native, {**layers, 9: empty})
    good, results = batch(3), []
    hidden, ids, weights = batch(3)
    for layer, arguments, reason in (
        (9, good, "expected it to be loaded"),
        (1, (hidden, ids + EXPERTS, weights), r"ids: expected experts 0\.\.5"),
    ):
        twin.enqueue(lambda: handoff.post(1, 2, *good), Label("post", 2, 1))
        twin.enqueue(
            lambda layer=layer, arguments=arguments: handoff.post(0, layer, *arguments), Label("post", layer, 0)
        )
        twin.enqueue(lambda layer=layer: handoff.take(0, layer), Label("take", layer, 0))
        twin.enqueue(lambda: handoff.take(1, 2), Label("take", 2, 1))
        with pytest.raises(EngineError, match=f"layer {layer}: .*{reason}"):
            twin.synchronize(timeout_s=60)
        twin.enqueue(handoff.reset, Label("reset"))
        for slot in range(2):
            twin.enqueue(lambda slot=slot: handoff.post(slot, 1, *good), Label("post", 1, slot))
        for slot in range(2):
            twin.enqueue(lambda slot=slot: results.append(handoff.take(slot, 1)), Label("take", 1, slot))
        twin.synchronize(timeout_s=60)
    assert all(torch.equal(result, layers[1].forward(*good)) for result in results)
    assert len(results) == 4
    handoff.close()


def heavy(runtime: ExpertsRuntime) -> tuple[NativeExperts, Arguments]:
    """A layer and a batch that take long, whatever the machine."""
    layer = runtime.make_layer(512, 512, 4, 4)
    assert isinstance(layer, NativeExperts)
    load_random_experts(layer)
    return layer, (torch.randn(8192, 512), *random_routing(8192, 4, 4))


def reset_until_done(handoff: MailboxHandoff, message: str) -> None:
    """Reset again while the workers have not left: a busy machine may give them no time to."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return handoff.reset()
        except EngineError as error:
            if message not in str(error) or time.monotonic() > deadline:
                raise


def test_slow_experts_are_an_error_in_time_and_the_next_step_works(runtime: ExpertsRuntime, twin: HostTwin) -> None:
    layer, arguments = heavy(runtime)
    handoff = MailboxHandoff(runtime.native, {17: layer}, TimeLimit(0.01))
    for _ in range(3):
        twin.enqueue(lambda: handoff.post(0, 17, *arguments), Label("post", 17, 0))
        twin.enqueue(lambda: handoff.take(0, 17), Label("take", 17, 0))
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"layer 17: expected the experts' result within 0\.01 s, got none"):
            twin.synchronize(timeout_s=60)
        assert time.monotonic() - start < 10
        reset_until_done(handoff, "layer 17: expected the experts to end within")
    handoff.close()
    patient = MailboxHandoff(runtime.native, {17: layer})
    few = tuple(tensor[:2] for tensor in arguments)
    patient.post(0, 17, *few)
    assert torch.equal(patient.take(0, 17), layer.forward(*few))
    patient.close()


def test_experts_whose_threads_are_gone_are_an_error(handoff: MailboxHandoff, runtime: ExpertsRuntime) -> None:
    runtime.close()
    for slot in range(2):
        handoff.post(slot, 1, *batch(1))
    for slot in range(2):
        with pytest.raises(EngineError, match=r"layer 1: .*stopped"):
            handoff.take(slot, 1)
    handoff.reset()


def test_close_ends_a_take_and_leaves_no_thread(runtime: ExpertsRuntime) -> None:
    before = server_threads()
    layer, arguments = heavy(runtime)
    handoff = MailboxHandoff(runtime.native, {3: layer})
    assert server_threads() == before + 1
    twin = HostTwin()
    twin.enqueue(lambda: handoff.post(0, 3, *arguments), Label("post", 3, 0))
    twin.enqueue(lambda: handoff.take(0, 3), Label("take", 3, 0))
    closer = threading.Timer(0.02, handoff.close)
    closer.start()
    with pytest.raises(EngineError, match=r"layer 3: .*given up|closed one|stopped one"):
        twin.synchronize(timeout_s=60)
    closer.join()
    assert server_threads() == before
    handoff.close()
    handoff.reset()
    for use in (lambda: handoff.post(0, 3, *arguments), lambda: handoff.take(0, 3)):
        with pytest.raises(EngineError, match="hand-off: expected an open one, got a closed one"):
            use()
    twin.close()


def test_a_handoff_that_goes_out_of_use_leaves_no_thread(
    runtime: ExpertsRuntime, layers: dict[int, NativeExperts]
) -> None:
    before = server_threads()
    MailboxHandoff(runtime.native, layers).post(0, 1, *batch(3))
    gc.collect()
    assert server_threads() == before


def test_an_interrupt_ends_a_take_and_reset_frees_the_slot(runtime: ExpertsRuntime) -> None:
    layer, arguments = heavy(runtime)
    handoff = MailboxHandoff(runtime.native, {3: layer})
    handoff.post(0, 3, *(tensor.repeat(5, 1) for tensor in arguments))
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))

    def take() -> None:
        timer.start()  # in here, for a busy machine may interrupt before we wait
        handoff.take(0, 3)
        timer.join(60)  # a fast machine is done before

    with pytest.raises(KeyboardInterrupt):
        take()
    timer.join()
    handoff.reset()
    few = tuple(tensor[:2] for tensor in arguments)
    handoff.post(0, 3, *few)
    assert torch.equal(handoff.take(0, 3), layer.forward(*few))
    handoff.close()


def test_a_fork_gets_an_error() -> None:
    script = (
        "import os, torch\n"
        "from hybrid_k2.accelerator import MailboxHandoff\n"
        "from hybrid_k2.errors import EngineError\n"
        "from tests.unit.experts_common import *\n"
        "runtime = native_runtime(); layer = runtime.make_layer(96, 64, 6, 3); load_random_experts(layer)\n"
        "handoff = MailboxHandoff(runtime.native, {1: layer})\n"
        "batch = (torch.randn(2, 96), *random_routing(2, 6, 3))\n"
        "handoff.post(0, 1, *batch)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    for use in (lambda: handoff.take(0, 1), lambda: handoff.post(1, 1, *batch), handoff.reset):\n"
        "        try:\n"
        "            use()\n"
        "        except EngineError as error:\n"
        "            assert 'got a fork of it' in str(error), error\n"
        "        else:\n"
        "            raise SystemExit('no error')\n"
        "    handoff.close()\n"
        "    del handoff\n"
        "    raise SystemExit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert torch.equal(handoff.take(0, 1), layer.forward(*batch))\n"
    )
    native_runtime().close()
    # From Python 3.12 on a fork beside threads is warned of.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, env=environment, capture_output=True, timeout=120, check=False
    )
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_payload_written_from_elsewhere_is_computed(
    runtime: ExpertsRuntime, layers: dict[int, NativeExperts]
) -> None:
    """As a device's copies write it: the flags alone are raised and waited for."""
    block = native.Mailbox(runtime.native, HIDDEN, TOP_K, 8, {2: layers[2].native})
    request, reply, *areas = (torch.from_numpy(area) for area in block.areas(1))
    for ticket, tokens in enumerate((8, 3), start=1):
        arguments = batch(tokens)
        for area, argument in zip(areas, arguments, strict=False):
            area[:tokens] = argument
        block.raise_request(1, 2, tokens, bf16=False)
        assert block.wait_reply(1, 60.0)
        assert torch.equal(areas[3][:tokens], layers[2].forward(*arguments))
        assert request.tolist() == [ticket, 2, tokens, 0]
        assert reply.tolist() == [ticket, 0]
    assert block.take_failure() is None
    block.raise_request(1, 9, 1, bf16=False)  # a layer that does not exist
    assert block.wait_reply(1, 60.0)
    assert reply.tolist() == [3, 1]
    assert block.take_failure() == (9, "expected a layer with experts, got one without")
    with pytest.raises(ValueError, match=r"slot: expected 0\.\.1, got 2"):
        block.areas(2)
    assert [size > 0 for _, size in block.blocks()] == [True] * 3
    block.close()


def test_random_steps_end_with_the_right_results(
    handoff: MailboxHandoff, layers: dict[int, NativeExperts], twin: HostTwin
) -> None:
    """Two slots in any order with delays on the lane; some steps fail, at a random point, and the next one is right."""
    rng = random.Random()
    batches = [batch(rng.randrange(5)) for _ in range(8)]
    expected = {(number, i): layer.forward(*batches[i]) for number, layer in layers.items() for i in range(8)}
    failed = 0

    def fail() -> None:
        raise ZeroDivisionError

    for _ in range(400):
        pending: dict[int, tuple[int, int]] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        for _ in range(rng.randrange(2, 14)):
            if rng.random() < 0.1:
                delay = rng.random() * 2e-4
                twin.enqueue(lambda delay=delay: time.sleep(delay), Label("delay"))
            if rng.random() < 0.01:
                twin.enqueue(fail, Label("fail"))
            slot = rng.randrange(2)
            if slot in pending:
                layer, i = pending.pop(slot)
                twin.enqueue(
                    lambda slot=slot, layer=layer, i=i, pairs=pairs: pairs.append(
                        (handoff.take(slot, layer), expected[layer, i])
                    ),
                    Label("take", layer, slot),
                )
            else:
                layer, i = pending[slot] = (rng.choice([1, 2]), rng.randrange(8))
                twin.enqueue(
                    lambda slot=slot, layer=layer, i=i: handoff.post(slot, layer, *batches[i]),
                    Label("post", layer, slot),
                )
        try:
            twin.synchronize(timeout_s=60)
        except ZeroDivisionError:
            failed += 1
        assert all(torch.equal(*pair) for pair in pairs)
        twin.enqueue(handoff.reset, Label("reset"))  # of what this step left in flight
    assert failed > 0

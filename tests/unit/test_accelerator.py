"""Accelerators without a GPU: order, errors, time limits, interrupts, closing, fork."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from hybrid_k2.accelerator import Accelerator, HostTwin, InlineAccelerator, Label, Trace
from hybrid_k2.accelerator import twin as twin_module
from hybrid_k2.errors import EngineError
from tests.conftest import REPO

LABEL = Label("front", layer=3, half=1)


@pytest.fixture
def twin() -> Iterator[HostTwin]:
    twin = HostTwin()
    yield twin
    twin.close()


@pytest.fixture(params=[InlineAccelerator, HostTwin])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    made = request.param()
    yield made
    made.close()


def twin_threads() -> int:
    return sum(thread.name.startswith("k2-") for thread in threading.enumerate())


def test_operations_run_in_order(accelerator: Accelerator) -> None:
    done: list[int] = []
    for step in range(3):
        for i in range(100):
            accelerator.enqueue(lambda i=i, step=step: done.append(100 * step + i), LABEL)
        accelerator.synchronize()
        assert done == list(range(100 * (step + 1)))


def test_operations_run_in_inference_mode(accelerator: Accelerator) -> None:
    modes: list[bool] = []
    accelerator.enqueue(lambda: modes.append(torch.is_inference_mode_enabled()), LABEL)
    accelerator.synchronize()
    assert modes == [True]
    assert not torch.is_inference_mode_enabled()


def test_the_trace_gets_each_operation(accelerator: Accelerator) -> None:
    accelerator.trace = Trace()
    before = time.monotonic_ns()
    for i in range(3):
        accelerator.enqueue(lambda: time.sleep(0.001), Label("front", layer=i))
    accelerator.synchronize()
    events, accelerator.trace = accelerator.trace.events, None
    assert [event.label.layer for event in events] == [0, 1, 2]
    edges = [before, *(t for event in events for t in (event.start_ns, event.stop_ns)), time.monotonic_ns()]
    assert edges == sorted(edges)
    assert all(event.stop_ns - event.start_ns >= 1_000_000 for event in events)
    accelerator.enqueue(lambda: None, LABEL)
    accelerator.synchronize()
    assert len(events) == 3


def test_an_error_skips_the_rest_of_the_step(accelerator: Accelerator) -> None:
    done: list[str] = []

    def fail() -> None:
        raise EngineError("layer 3: expected much, got little")

    def run_step() -> None:
        accelerator.enqueue(lambda: done.append("before"), LABEL)
        accelerator.enqueue(fail, LABEL)
        accelerator.enqueue(lambda: done.append("behind"), LABEL)
        accelerator.synchronize()

    for _ in range(3):
        with pytest.raises(EngineError, match="layer 3: expected much"):
            run_step()
        accelerator.enqueue(lambda: done.append("next"), LABEL)
        accelerator.synchronize()
    assert done == ["before", "next"] * 3


def test_the_twin_works_beside_the_thread_that_enqueues(twin: HostTwin) -> None:
    """Each waits for the other in turn: on one thread this would never end."""
    there, back = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)
    names: list[str] = []

    def meet() -> None:
        names.append(threading.current_thread().name)
        there.wait()
        back.wait()

    for _ in range(3):
        twin.enqueue(meet, LABEL)
    for _ in range(3):
        there.wait()
        back.wait()
    twin.synchronize()
    assert names == ["k2-twin"] * 3


def test_the_first_error_is_the_one_that_is_raised(twin: HostTwin) -> None:
    def fail(number: int) -> None:
        raise ValueError(str(number))

    for i in range(5):
        twin.enqueue(lambda i=i: fail(i), LABEL)
    with pytest.raises(ValueError, match=r"^0$"):
        twin.synchronize()
    twin.synchronize()  # and only once


def test_an_operation_that_hangs_is_named_and_the_next_step_follows_it(twin: HostTwin) -> None:
    release = threading.Event()
    done: list[str] = []
    twin.enqueue(release.wait, Label("take", layer=17, half=0))
    twin.enqueue(lambda: done.append("behind"), LABEL)
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"twin: take, layer 17, half 0: expected an operation to end within 0\.05 s"):
        twin.synchronize(timeout_s=0.05)
    assert time.monotonic() - start < 10
    twin.enqueue(lambda: done.append("next"), LABEL)
    with pytest.raises(EngineError, match="take, layer 17"):
        twin.synchronize(timeout_s=0.05)
    assert done == []
    release.set()
    twin.enqueue(lambda: done.append("last"), LABEL)
    twin.synchronize(timeout_s=60)
    assert done == ["last"]


def test_the_time_limit_is_for_one_operation(twin: HostTwin) -> None:
    for _ in range(25):
        twin.enqueue(lambda: time.sleep(0.05), LABEL)
    twin.synchronize(timeout_s=1.0)


def test_a_late_error_of_a_step_that_was_given_up_is_not_the_next_ones(twin: HostTwin) -> None:
    release = threading.Event()

    def fail_late() -> None:
        release.wait(60)
        raise ValueError("late")

    twin.enqueue(fail_late, LABEL)
    with pytest.raises(EngineError, match="front, layer 3, half 1"):
        twin.synchronize(timeout_s=0.01)
    done: list[int] = []
    twin.enqueue(lambda: done.append(1), LABEL)
    release.set()
    twin.synchronize()
    assert done == [1]


def test_abandon_skips_what_has_not_begun(twin: HostTwin) -> None:
    begun, release = threading.Event(), threading.Event()
    done: list[str] = []

    def block() -> None:
        begun.set()
        release.wait(60)
        done.append("begun")

    twin.enqueue(block, LABEL)
    twin.enqueue(lambda: done.append("waiting"), LABEL)
    begun.wait(60)
    twin.abandon()
    twin.enqueue(lambda: done.append("next"), LABEL)
    release.set()
    twin.synchronize()
    assert done == ["begun", "next"]


def test_an_interrupt_leaves_the_twin_usable(twin: HostTwin) -> None:
    for _ in range(5):
        release = threading.Event()
        done: list[str] = []
        twin.enqueue(release.wait, LABEL)
        twin.enqueue(lambda done=done: done.append("behind"), LABEL)
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))

        def synchronize(timer: threading.Timer = timer) -> None:
            timer.start()  # in here, for a busy machine may interrupt before we wait
            twin.synchronize(timeout_s=60)

        with pytest.raises(KeyboardInterrupt):
            synchronize()
        timer.join()
        release.set()
        twin.enqueue(lambda done=done: done.append("next"), LABEL)
        twin.synchronize()
        assert done == ["next"]


def test_operations_are_released_when_they_are_done(twin: HostTwin) -> None:
    class Weights:
        pass

    held = Weights()
    gone = weakref.ref(held)
    twin.enqueue(lambda held=held: None, LABEL)
    del held
    twin.synchronize()
    twin.enqueue(lambda: None, LABEL)  # the lane has let go of the first once it is at the second
    twin.synchronize()
    assert gone() is None


def test_close_leaves_no_thread(twin: HostTwin) -> None:
    before = twin_threads()
    other = HostTwin("another")
    done: list[int] = []
    for i in range(50):
        other.enqueue(lambda i=i: (time.sleep(0.001), done.append(i)), LABEL)
    assert twin_threads() == before + 1
    other.close()
    assert twin_threads() == before
    assert len(done) < 50  # the rest was skipped
    other.close()
    for use in (other.synchronize, lambda: other.enqueue(lambda: None, LABEL)):
        with pytest.raises(EngineError, match="another: expected an open accelerator, got a closed one"):
            use()


def test_a_twin_that_goes_out_of_use_leaves_no_thread() -> None:
    before = twin_threads()
    HostTwin().enqueue(lambda: None, LABEL)
    gc.collect()
    assert twin_threads() == before


def test_close_does_not_wait_for_ever(
    twin: HostTwin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(twin_module, "CLOSE_S", 0.05)
    begun, release = threading.Event(), threading.Event()
    twin.enqueue(lambda: (begun.set(), release.wait()), Label("take", layer=5))
    begun.wait(60)
    start = time.monotonic()
    twin.close()
    assert time.monotonic() - start < 10
    assert "take, layer 5 has not ended after 0.05 s" in caplog.text
    release.set()


def test_a_fork_gets_an_error(twin: HostTwin) -> None:
    script = (
        "import os, sys\n"
        "from hybrid_k2.accelerator import HostTwin, Label\n"
        "from hybrid_k2.errors import EngineError\n"
        "twin = HostTwin()\n"
        "twin.enqueue(lambda: None, Label('front'))\n"
        "twin.synchronize()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    for use in (lambda: twin.enqueue(lambda: None, Label('front')), twin.synchronize):\n"
        "        try:\n"
        "            use()\n"
        "        except EngineError as error:\n"
        "            assert 'got a fork of it' in str(error), error\n"
        "        else:\n"
        "            raise SystemExit('no error')\n"
        "    twin.abandon()\n"
        "    twin.close()\n"
        "    raise SystemExit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "twin.enqueue(lambda: None, Label('front'))\n"
        "twin.synchronize()\n"
    )
    # From Python 3.12 on a fork beside threads is warned of.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, env=environment, capture_output=True, timeout=120, check=False
    )
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_program_that_closes_nothing_still_ends() -> None:
    script = (
        "import time\n"
        "from hybrid_k2.accelerator import HostTwin, Label\n"
        "twin = HostTwin()\n"
        "for _ in range(100): twin.enqueue(lambda: time.sleep(0.01), Label('front'))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, b"")

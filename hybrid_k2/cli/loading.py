"""Load the engine, and say before it happens what will happen: rules, plan, and then the progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hybrid_k2.cli.interrupts import leaving_at_once
from hybrid_k2.cli.terminal import Output
from hybrid_k2.placement.sizes import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from hybrid_k2.engine import Engine
    from hybrid_k2.placement import Plan

Progress = Callable[[int, int], None]
LINE_EVERY_S = 10.0  # where there is no bar
LEAST_S = 0.1  # a speed over less time says nothing


def load_engine(
    model: str,
    rules: str | None,
    notes: Output,
    trace: Path | None = None,
    watch: Progress | None = None,
    check: Callable[[Plan], None] | None = None,
) -> Engine:
    """Plan, print the plan, load; `trace` is written when the engine is closed.

    `watch` gets the progress, too; then it is shown in lines, which other lines may stand between. `check` gets the
    plan before anything large is read, and may end the loading with an error.
    Raises: HybridK2Error: everything that is wrong with the checkpoint, the rules or the machine.
    """
    with leaving_at_once():
        from hybrid_k2.engine import Engine

    started, speed = time.perf_counter(), Speed()

    def on_plan(plan: Plan) -> None:
        say_plan(plan, notes)
        if check is not None:
            check(plan)

    with show_progress(notes, speed) if watch is None else _watched(notes, speed, watch) as progress:
        engine = Engine.load(model, rules, on_plan=on_plan, progress=progress, trace=trace)
    seconds = time.perf_counter() - started
    notes.line(f"ready after {seconds:.1f} s; {speed.summary()}; experts: {engine.experts_name}", "dim")
    return engine


class Speed:
    """Follow the bytes that are read, from the first report on: what comes before is not reading."""

    def __init__(self) -> None:
        self.done = 0
        self._first = self._marked = (0.0, 0)  # time, bytes
        self._last = 0.0

    def report(self, done: int) -> None:
        """Take note that `done` bytes are read by now."""
        self._last = time.monotonic()
        if self.done == 0:
            self._first = self._marked = (self._last, done)
        self.done = done

    def since_mark(self) -> tuple[float, float]:
        """Return the seconds since `mark`, or since the first report, and the bytes per second meanwhile."""
        return self._since(self._marked)

    def mark(self) -> None:
        """Let `since_mark` count from here."""
        self._marked = (self._last, self.done)

    def summary(self) -> str:
        """Say what was read, and how fast where there was time to tell."""
        seconds, speed = self._since(self._first)
        return f"read {format_bytes(self.done)}" + (f" at {format_bytes(int(speed))}/s" if seconds >= LEAST_S else "")

    def _since(self, then: tuple[float, int]) -> tuple[float, float]:
        seconds = self._last - then[0]
        return seconds, (self.done - then[1]) / seconds if seconds > 0 else 0.0


def say_plan(plan: Plan, notes: Output) -> None:
    """Print which rules were chosen and why, where everything goes, and which kernels compute the experts.

    Raises: IsaError: HYBRID_K2_ISA asks for kernels that cannot be used.
    """
    notes.line(f"rules: {plan.rules.reason or f'{plan.rules.source} (as asked)'}")
    notes.line(plan.table(), "dim")
    notes.line(f"kernels: {kernels(plan)}", "dim")


def kernels(plan: Plan) -> str:
    """Return what will compute the routed experts, and which native kernels there are."""
    from hybrid_k2.experts import isa_facts

    if plan.numerics == "reference":
        return "reference (torch, fp32)"
    facts = isa_facts(plan.numerics)
    if not facts:
        return "numba; the native extension is not installed"
    chosen = next(fact.name for fact in facts if fact.chosen)
    built = ", ".join(fact.name if fact.supported else f"{fact.name} (not on this CPU)" for fact in facts if fact.built)
    return f"native {chosen}; built: {built}"


@contextmanager
def show_progress(notes: Output, speed: Speed) -> Iterator[Progress]:
    """Show the bytes that were read: a bar with the speed on a terminal with styles, elsewhere a line now and then."""
    if not notes.styled:
        yield _lines(notes, speed)
        return
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("loading"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=notes.console,
        transient=True,
    )
    task = bar.add_task("loading", total=None)

    def report(done: int, total: int) -> None:
        speed.report(done)
        bar.start()  # not earlier: the plan is printed first
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()


@contextmanager
def _watched(notes: Output, speed: Speed, watch: Progress) -> Iterator[Progress]:
    show = _lines(notes, speed)

    def report(done: int, total: int) -> None:
        show(done, total)
        watch(done, total)

    yield report


def _duration(seconds: float) -> str:
    """Show how long something takes, in minutes from two of them on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _lines(notes: Output, speed: Speed) -> Progress:
    def report(done: int, total: int) -> None:
        speed.report(done)
        seconds, rate = speed.since_mark()
        if seconds >= LINE_EVERY_S:
            speed.mark()
            left = f", {_duration((total - done) / rate)} left" if rate else ""
            share = 100 * done // max(total, 1)
            notes.line(f"loading: {share} % of {format_bytes(total)}, {format_bytes(int(rate))}/s{left}")

    return report

"""The demo model, really asked; and a checkpoint as a chat checks it before anything large is read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from hybrid_k2.cli.doctor.disk import measure_read
from hybrid_k2.cli.doctor.finding import FAILED, OK, WARNING, Finding, failed
from hybrid_k2.cli.doctor.host import describe_plan
from hybrid_k2.demo import demo_path
from hybrid_k2.engine import Engine, SamplingParams
from hybrid_k2.engine.loading import DEMO, plan_checkpoint
from hybrid_k2.errors import HardwareError, HybridK2Error, RulesError, shown
from hybrid_k2.placement import Plan
from hybrid_k2.placement.sizes import format_bytes

QUESTION, ANSWER = "What is 17 + 25?", "42"
MOST_TOKENS = 200


def check_demo() -> Iterator[Finding]:
    """Load the built-in model by the rules that a chat would choose, and ask it what it knows.

    Raises: HybridK2Error: it cannot be loaded, or fails.
    """
    start = time.perf_counter()
    with Engine.load(DEMO) as engine:
        loaded = time.perf_counter()
        messages = [{"role": "user", "content": QUESTION}]
        content = engine.chat(messages, params=SamplingParams(temperature=0, max_tokens=MOST_TOKENS)).content
        experts = engine.experts_name
    end = time.perf_counter()
    if ANSWER in content:
        text = f"asked {QUESTION!r}, it says {ANSWER} ({experts}; loaded in {loaded - start:.1f} s, "
        yield Finding("demo model", OK, f"{text}answered in {end - loaded:.1f} s)")
    else:
        text = f"asked {QUESTION!r}: expected {ANSWER} in the answer, got {shown(content)} ({experts})"
        yield Finding("demo model", FAILED, text, "do not trust replies of this machine; please report this")


def check_model(model: str, rules: str | None) -> Iterator[Finding]:
    """Check a checkpoint's files and headers, its plan on this machine, and how fast its disk is."""
    folder = demo_path() if model == DEMO else Path(os.path.expanduser(model))
    if not os.path.exists(folder) and "/" in model and not model.startswith((".", "/", "~")):
        yield from _repository(model, rules)
        return
    try:
        plan = _plan_of_checked(model, rules)
    except (RulesError, HardwareError) as error:  # what comes last: the files are as they should be
        yield _complete(folder)
        yield failed("plan", error)
    except HybridK2Error as error:
        yield failed("checkpoint", error)
        return
    else:
        yield _complete(folder)
        yield Finding("plan", OK, f"fits: {describe_plan(plan)}")
    yield from measure_read(_weights(folder))


class _Checked(Exception):  # noqa: N818 - nothing is wrong
    """End a loading where the plan is there and nothing large was read."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan


def _plan_of_checked(model: str, rules: str | None) -> Plan:
    def stop(plan: Plan) -> None:
        raise _Checked(plan)

    try:
        Engine.load(model, rules, on_plan=stop).close()
    except _Checked as checked:
        return checked.plan
    raise AssertionError("a loading that does not make a plan")


def _repository(model: str, rules: str | None) -> Iterator[Finding]:
    plan = plan_checkpoint(model, rules)
    text = f"{model} is no folder here: of the repository only the configuration was looked at"
    yield Finding("checkpoint", WARNING, text, f"hybrid-k2 chat {model} downloads it")
    yield Finding("plan", OK, f"fits: {describe_plan(plan)}")


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _complete(folder: Path) -> Finding:
    files = _weights(folder)
    size = format_bytes(sum(file.stat().st_size for file in files))
    count = "one file" if len(files) == 1 else f"{len(files)} files"
    text = f"complete: {count} with {size}; headers, sizes and shapes are those of its configuration"
    return Finding("checkpoint", OK, text)

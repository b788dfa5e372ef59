"""Compare our expert layer with those that pip can install, in interleaved runs on the same weights and tokens.

    python -m bench.peers --kt-python /tmp/kt/bin/python --ggml-python /tmp/ggml/bin/python

Each contender is a process of its own, on the interpreter that has its package (see requirements.txt). In every round
each computes the same calls; the others are stopped meanwhile. Times are medians over rounds, ratios medians of the
ratios within a round. On a machine that others use, `--clock cpu --threads 1` counts processor time.
A contender that is absent, fails, or does not support this CPU is skipped, with the reason.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.peers.arguments import parse
from bench.peers.exchange import Sizes
from bench.peers.inputs import Inputs
from bench.peers.process import AbsentError, Contender
from bench.peers.report import OURS, Report, Samples
from hybrid_k2.placement import Machine

DISTINCT = 4
PROBE_SECONDS = 0.05
SPARE_BYTES = 2 << 30  # interpreters, activations, an expert in float64


class Comparison:
    """Run the contenders in turns."""

    def __init__(self, folder: Path, sizes: Sizes, threads: int, seed: int, clock: str) -> None:
        self.clock = clock
        self.sizes = sizes
        self.threads = threads
        self.folder = folder
        self.contenders: dict[str, Contender] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.inputs = Inputs(folder, sizes, seed)

    def load(self, pythons: dict[str, str]) -> None:
        """Start the contenders, one after the other. Raises: AbsentError: none of ours is there to compare with."""
        for name, python in pythons.items():
            _say(f"loading {name}")
            try:
                self.contenders[name] = Contender(name, python, self.folder)
                answer = self.contenders[name].ask("load", sizes=asdict(self.sizes), threads=self.threads)
                self.about[name] = answer["about"]
                self.contenders[name].stop()
            except AbsentError as error:
                self.skip(name, error)
        self.need_ours()

    def need_ours(self) -> None:
        """Raises: AbsentError: none of ours is left."""
        if not set(OURS) & set(self.contenders):
            raise AbsentError(
                next((f"{name}: {self.skipped[name]}" for name in OURS if name in self.skipped), "none of ours")
            )

    def skip(self, name: str, why: AbsentError) -> None:
        """Leave a contender out from now on."""
        self.skipped[name] = str(why)
        _say(f"skipped {name}: {why}")
        if name in self.contenders:
            self.contenders.pop(name).close()

    def measure(self, tokens: list[int], rounds: int) -> list[Samples]:
        """Measure every number of tokens in every round."""
        all_samples = [Samples(count, self.sizes.expert_bytes, self.sizes.operations(count)) for count in tokens]
        for number in range(rounds):
            _say(f"round {number + 1} of {rounds}")
            for samples in all_samples:
                self.turns(samples, number)
        return all_samples

    def turns(self, samples: Samples, number: int) -> None:
        """Let each contender compute the same calls; who begins changes with the round. Raises: AbsentError."""
        names = list(self.contenders)
        distinct = self.inputs.route(samples.tokens)
        seconds: dict[str, float] = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            try:
                if name in OURS and self.clock == "wall":
                    samples.read_gbps.append(self.ask(name, "limits", seconds=PROBE_SECONDS)["read_gbps"])
                seconds[name] = median(self.ask(name, "run", tokens=samples.tokens)[self.clock])
            except AbsentError as error:
                self.skip(name, error)
                continue
            off = self.inputs.error(np.load(self.folder / f"output.{name}.npy"))
            samples.errors[name] = max(samples.errors.get(name, 0.0), off)
        self.need_ours()
        samples.distinct.append(distinct)
        samples.rounds.append({name: seconds[name] for name in names if name in seconds})

    def ask(self, name: str, do: str, **request: Any) -> dict[str, Any]:
        """Let one contender run, and no other. Raises: AbsentError."""
        self.contenders[name].go_on()
        answer = self.contenders[name].ask(do, **request)
        self.contenders[name].stop()
        return answer

    def close(self) -> None:
        """End all processes."""
        for contender in self.contenders.values():
            contender.close()


def compare(
    sizes: Sizes, tokens: list[int], rounds: int, threads: int, pythons: dict[str, str], seed: int, clock: str
) -> Report:
    """Measure all contenders. Raises: AbsentError: none of ours is there to compare with."""
    with tempfile.TemporaryDirectory(prefix="hybrid-k2-peers-") as folder:
        comparison = Comparison(Path(folder), sizes, threads, seed, clock)
        try:
            comparison.load(pythons)
            samples = comparison.measure(tokens, rounds)
        finally:
            comparison.close()
    return Report(
        machine=describe_machine(threads),
        sizes=asdict(sizes),
        rounds=rounds,
        clock=clock,
        raw_read_gbps=median([gbps for each in samples for gbps in each.read_gbps]) if clock == "wall" else None,
        contenders=comparison.about,
        skipped=comparison.skipped,
        results=tuple(result for each in samples for result in each.results()),
    )


def describe_machine(threads: int) -> dict[str, Any]:
    """Say what the figures were taken on, and when."""
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.machine(),
        "threads": threads,
        "cpus": len(os.sched_getaffinity(0)),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
        "load": os.getloadavg()[0],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or JSON; write JSON to a file beside it."""
    args = parse(arguments, __doc__ or "")
    most_tokens, distinct = max(args.tokens), min(DISTINCT, args.experts)
    sizes = Sizes(args.hidden, args.intermediate, args.experts, args.top_k, most_tokens, distinct)
    pythons = dict.fromkeys(args.numerics, sys.executable)
    pythons["kt-kernel"] = args.kt_python or sys.executable
    pythons["ggml"] = args.ggml_python or sys.executable
    pythons["ik_llama"] = args.ik_python or pythons["ggml"]
    machine = Machine.probe()
    # kt-kernel's process may hold the weights twice, and while ggml loads it holds a third of them twice.
    needed = sizes.experts * sizes.expert_bytes * (len(pythons) + 2) + SPARE_BYTES
    if needed > machine.host_available_bytes:
        sys.exit(
            f"error: expected {needed >> 20} MiB of memory, got {machine.host_available_bytes >> 20}; fewer --experts"
        )
    try:
        report = compare(sizes, args.tokens, args.rounds, args.threads or machine.cores, pythons, args.seed, args.clock)
    except AbsentError as error:
        sys.exit(f"error: {error}")
    text = json.dumps(report.to_json(), indent=1)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else report.table())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()

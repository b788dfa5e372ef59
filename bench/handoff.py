"""Measure the hand-off to the routed experts and back, on this host.

    python bench/handoff.py [--threads N] [--rounds 2000] [--json]

The round trip is the time from the call of `post` to the return of `take`, from Python, by one thread: of an empty
batch, which costs nothing but the hand-overs between threads, and of one token through a tiny layer (hidden 64, two
experts). The layer called directly (hand-off "none") is the floor. Calls of all rows are interleaved, so that a busy
neighbour meets all alike; the tenth percentile is what a quiet moment gives. Threads sleep between the calls where they
have no CPUs to spin on (docs/handoff.md), so the number of CPUs is printed with the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import quantiles

import torch
from torch import Tensor

from hybrid_k2.accelerator import DirectHandoff, Handoff, MailboxHandoff, SubmitHandoff
from hybrid_k2.checkpoint import ExpertWeights, PackedWeight
from hybrid_k2.experts import ExpertsRuntime, open_experts
from hybrid_k2.experts.cpu import NativeExperts

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 4, 2
LAYER = 0


@dataclass(frozen=True)
class Result:
    """One hand-off with one number of tokens. Units: us."""

    handoff: str
    tokens: int
    p10: float
    median: float
    p99: float


def random_weight(rows: int, inputs: int) -> PackedWeight:
    """Make a matrix."""
    packed = torch.randint(-(2**31), 2**31, (rows, inputs // 8), dtype=torch.int32)
    return PackedWeight(packed, torch.rand(rows, inputs // 32).bfloat16())


def load(runtime: ExpertsRuntime) -> NativeExperts:
    """Make the layer."""
    layer = runtime.make_layer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
    assert isinstance(layer, NativeExperts)
    inner = (INTERMEDIATE, HIDDEN)
    for expert in range(EXPERTS):
        layer.load_expert(expert, ExpertWeights(*(random_weight(*shape) for shape in (inner, inner, inner[::-1]))))
    return layer


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make a batch."""
    ids = torch.rand(tokens, EXPERTS).argsort(dim=1)[:, :TOP_K].to(torch.int32)
    return torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, TOP_K)


def round_trip(handoff: Handoff, arguments: tuple[Tensor, Tensor, Tensor]) -> Callable[[], float]:
    """Return a function that hands a batch over, takes its result and returns the seconds."""

    def call() -> float:
        start = time.perf_counter()
        handoff.post(0, LAYER, *arguments)
        handoff.take(0, LAYER)
        return time.perf_counter() - start

    return call


def run(handoffs: dict[str, Handoff], rounds: int) -> list[Result]:
    """Time every case in every round."""
    cases = [
        (name, tokens, round_trip(handoff, batch(tokens))) for name, handoff in handoffs.items() for tokens in (0, 1)
    ]
    times: list[list[float]] = [[] for _ in cases]
    for round_ in range(rounds + 1):
        for (_, _, call), seconds in zip(cases, times, strict=True):
            trip = call()
            if round_:  # the first one warms up
                seconds.append(trip * 1e6)
    hundredths = [quantiles(seconds, n=100) for seconds in times]
    return [
        Result(name, tokens, cuts[9], cuts[49], cuts[98])
        for (name, tokens, _), cuts in zip(cases, hundredths, strict=True)
    ]


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=max(1, cpus - 1))
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    runtime = open_experts("exact", args.threads)
    if runtime.native is None:
        sys.exit("error: the native kernels are missing, so there is nothing to measure")
    layer = load(runtime)
    mailbox = MailboxHandoff(runtime.native, {LAYER: layer})
    results = run(
        {"none": DirectHandoff({LAYER: layer}), "submit": SubmitHandoff({LAYER: layer}), "mailbox": mailbox},
        args.rounds,
    )
    mailbox.close()
    runtime.close()
    load_average = os.getloadavg()[0]
    if args.json:
        where = {"cpus": cpus, "threads": args.threads, "load": load_average}
        print(json.dumps(where | {"results": [asdict(result) for result in results]}, indent=1))
        return
    print(f"{runtime.name}, {args.threads} threads on {cpus} CPUs, load {load_average:.1f}")
    print("hand-off  tokens  p10 us  median us  p99 us")
    for result in results:
        print(f"{result.handoff:8} {result.tokens:7d} {result.p10:7.1f} {result.median:10.1f} {result.p99:7.1f}")


if __name__ == "__main__":
    main()

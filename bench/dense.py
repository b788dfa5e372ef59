"""Measure the dense layers of one MoE layer on the host at the widths of K2.6, against the machine's limits.

    python bench/dense.py [--tokens 1,2,3,4,6,8,12,16,64] [--dtypes bf16,int8] [--threads N] [--rounds 7] [--json]

The attention projections and the shared expert are 137 million weights: 274 MB in bf16, 145 MB in int8, more than a
cache, so that each pass over them finds them cold. Rounds of all cases are interleaved with probes of the raw read
bandwidth and of the multiplying instructions' peak, so that a busy neighbour meets the limits as well as the kernels.
The floor is max(bytes / raw read, operations / peak); shares and times are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hybrid_k2.dense import HostMatrix, multiply_all
from hybrid_k2.experts import ExpertsRuntime, open_experts
from hybrid_k2.native import native

HIDDEN, Q_LORA, LATENT, INNER = 7168, 1536, 576, 2048
QUERIES, VALUES = 64 * 192, 64 * 128
# Matrices that share an input are computed in one go, as the model does.
STEPS = {
    "q_a": [(Q_LORA, HIDDEN)],
    "kv_a": [(LATENT, HIDDEN)],
    "q_b": [(QUERIES, Q_LORA)],
    "o": [(HIDDEN, VALUES)],
    "gate, up": [(INNER, HIDDEN), (INNER, HIDDEN)],
    "down": [(HIDDEN, INNER)],
}
PROBE_SECONDS = 0.05


@dataclass(frozen=True)
class Result:
    """What one number of tokens took. Units: ms, 10^9 bytes or operations per second, shares of 1."""

    dtype: str
    tokens: int
    ms: float
    gbps: float
    gops: float
    share_of_floor: float


@dataclass
class Case:
    """One dtype and number of tokens, with the time and the share of the floor in each round."""

    dtype: str
    tokens: int
    steps: list[list[HostMatrix]]
    inputs: list[Tensor] = field(init=False)
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inputs = [torch.randn(self.tokens, step[0].shape[1]) for step in self.steps]

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for step in self.steps for matrix in step)

    @property
    def operations(self) -> int:
        return 2 * self.tokens * sum(matrix.shape.numel() for step in self.steps for matrix in step)

    def time(self) -> float:
        """Return the best of the passes that a short time holds."""
        best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
        while best == float("inf") or time.perf_counter() < end:
            start = time.perf_counter()
            for step, x in zip(self.steps, self.inputs, strict=True):
                multiply_all(step, x)
            best = min(best, time.perf_counter() - start)
        return best

    def result(self) -> Result:
        seconds = median(self.seconds)
        rates = (self.nbytes / seconds / 1e9, self.operations / seconds / 1e9)
        return Result(self.dtype, self.tokens, seconds * 1e3, *rates, median(self.shares))


def load(runtime: ExpertsRuntime, dtype: str) -> list[list[HostMatrix]]:
    """Make random matrices."""
    steps = []
    for shapes in STEPS.values():
        step = []
        for rows, inputs in shapes:
            matrix = HostMatrix(runtime.native, rows, inputs, dtype)
            matrix.load_rows(0, torch.randn(rows, inputs).mul_(inputs**-0.5).bfloat16())
            step.append(matrix)
        steps.append(step)
    return steps


def run(runtime: ExpertsRuntime, cases: list[Case], rounds: int) -> dict[str, Any]:
    """Time every case in every round, each between two probes of its limits."""
    raw: list[float] = []
    peaks: dict[str, list[float]] = {case.dtype: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            before = runtime.measure_read_gbps(PROBE_SECONDS)
            seconds = case.time()
            read = max(before, runtime.measure_read_gbps(PROBE_SECONDS))
            peak = native.measure_dense_peak_gops(runtime.native, case.dtype == "int8", PROBE_SECONDS)
            raw.append(read)
            peaks[case.dtype].append(peak)
            case.seconds.append(seconds)
            case.shares.append(max(case.nbytes / read, case.operations / peak) / 1e9 / seconds)
    return {
        "raw_read_gbps": median(raw),
        "peak_gops": {dtype: median(values) for dtype, values in peaks.items()},
        "results": [asdict(case.result()) for case in cases],
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,2,3,4,6,8,12,16,64")
    parser.add_argument("--dtypes", default="bf16,int8")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    runtime = open_experts("exact", args.threads)
    if runtime.native is None:
        sys.exit("error: the native kernels are missing, so there is nothing to measure")
    runtime.tune()
    weights = {dtype: load(runtime, dtype) for dtype in args.dtypes.split(",")}
    cases = [Case(dtype, int(tokens), steps) for dtype, steps in weights.items() for tokens in args.tokens.split(",")]
    report = run(runtime, cases, args.rounds)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    peaks = ", ".join(f"{dtype} {gops:.0f} GOPS" for dtype, gops in report["peak_gops"].items())
    print(f"{runtime.name}, {args.threads} threads; raw read {report['raw_read_gbps']:.1f} GB/s; peaks: {peaks}")
    print("dtype   tokens         ms    GB/s    GOPS  of the floor")
    for r in report["results"]:
        print(
            f"{r['dtype']:5} {r['tokens']:8d} {r['ms']:10.2f} {r['gbps']:7.1f} {r['gops']:7.0f}"
            f" {r['share_of_floor']:13.0%}"
        )
    runtime.close()


if __name__ == "__main__":
    main()

"""Measure one MoE layer of routed experts at the widths of K2.6, against the memory's read bandwidth in the same run.

    python bench/experts.py [--tokens 1,4,16,64] [--threads N] [--seconds 2]

Sixteen experts of random INT4 weights take 396 MB, far more than a cache, so that each call finds them cold. Times are
the best of many calls: on a shared machine the others measure the neighbours. `cpu ms` is the processor time of all
threads together, which neighbours touch less. The raw read is the best of probes spread over the run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass

import torch

from hybrid_k2.checkpoint import ExpertWeights, PackedWeight
from hybrid_k2.experts import ExpertsBackend, open_experts

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 7168, 2048, 16, 8
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 9 // 16  # 4.5 bits per weight
PARTS = 4  # of a case, with a probe of the memory between them
OPERATIONS = 2 * 3 * HIDDEN * INTERMEDIATE  # per token and expert


@dataclass(frozen=True)
class Case:
    """What one number of tokens took."""

    tokens: int
    distinct_experts: int
    seconds: float
    cpu_seconds: float

    @property
    def gbps(self) -> float:
        """Weights read per second, each touched expert counted once."""
        return self.distinct_experts * EXPERT_BYTES / self.seconds / 1e9

    @property
    def gops(self) -> float:
        """Multiplications and additions per second."""
        return self.tokens * TOP_K * OPERATIONS / self.seconds / 1e9

    def row(self, raw_gbps: float) -> str:
        """One line of the table."""
        milliseconds = f"{self.seconds * 1e3:9.2f} {self.cpu_seconds * 1e3:9.2f}"
        rates = f"{self.gbps:7.1f} {self.gops:7.0f} {self.gbps / raw_gbps:12.0%}"
        return f"{self.tokens:6d} {self.distinct_experts:8d} {milliseconds} {rates}"


def random_expert() -> ExpertWeights:
    """Return random values and scales of about the size of real ones."""

    def matrix(rows: int, columns: int) -> PackedWeight:
        words = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int32)
        scale = torch.rand(rows, columns // 32).add_(0.5).mul_(0.01).to(torch.bfloat16)
        return PackedWeight(words, scale)

    return ExpertWeights(matrix(INTERMEDIATE, HIDDEN), matrix(INTERMEDIATE, HIDDEN), matrix(HIDDEN, INTERMEDIATE))


def measure(layer: ExpertsBackend, tokens: int, seconds: float) -> Case:
    """Time calls with fresh routing for `seconds`, and keep the best."""
    hidden = torch.randn(tokens, HIDDEN).to(torch.bfloat16)
    weights = torch.rand(tokens, TOP_K)
    best, best_cpu, distinct = float("inf"), float("inf"), 0
    order = torch.arange(EXPERTS, dtype=torch.int32)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        order = order.roll(TOP_K)  # one token meets the other half of the experts each time: nothing is in a cache
        rows = [order[:TOP_K] if t == 0 else torch.randperm(EXPERTS)[:TOP_K].to(torch.int32) for t in range(tokens)]
        ids = torch.stack(rows)
        start, cpu_start = time.perf_counter(), time.process_time()
        layer.forward(hidden, ids, weights)
        elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        best_cpu = min(best_cpu, cpu)
        if elapsed < best:
            best, distinct = elapsed, len(ids.unique())
    return Case(tokens, distinct, best, best_cpu)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=2.0, help="per number of tokens")
    args = parser.parse_args()

    torch.manual_seed(0)
    runtime = open_experts("exact", args.threads)
    layer = runtime.make_layer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
    start = time.perf_counter()
    for expert in range(EXPERTS):
        layer.load_expert(expert, random_expert())
    print(
        f"{runtime.name}, {args.threads} threads, {layer.nbytes / 1e6:.0f} MB of weights "
        f"(made and packed in {time.perf_counter() - start:.1f} s)",
        file=sys.stderr,
    )
    raw, cases = [runtime.measure_read_gbps()], []
    for tokens in map(int, args.tokens.split(",")):
        for _ in range(PARTS):
            cases.append(measure(layer, tokens, args.seconds / PARTS))
            raw.append(runtime.measure_read_gbps())
    print(f"raw read: best {max(raw):.1f} GB/s, median {sorted(raw)[len(raw) // 2]:.1f} of {len(raw)} probes")
    print("tokens  experts        ms    cpu ms    GB/s    GOPS  of best raw")
    for start in range(0, len(cases), PARTS):
        print(min(cases[start : start + PARTS], key=lambda case: case.seconds).row(max(raw)))
    layer.close()
    runtime.close()


if __name__ == "__main__":
    main()

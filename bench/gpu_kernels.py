"""Measure the Triton kernels on a CUDA card at the widths of K2.6, against the card's limits in the same run.

    python bench/gpu_kernels.py [--only experts,attention,dense] [--rounds 20] [--json]

The limits are torch's copy of 1 GiB (bytes read plus bytes written) and its product of two bf16 matrices of 8192. A
case launches its kernels on as many sets of weights or pages as do not fit a cache, inside one CUDA graph, so that
neither the caches nor Python's launches are measured. The floor of a case is max(bytes / copy, operations / product); a
share is the floor by the measured time, medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from hybrid_k2.accelerator.kernels import have_triton
from hybrid_k2.dense import quantize_int8

COLD_BYTES = 256 << 20  # several times the largest cache of a card
FP8_FROM = (8, 9)


@dataclass(frozen=True)
class Widths:
    """The sizes of the model that are measured."""

    hidden: int = 7168
    intermediate: int = 2048
    heads: int = 64
    kv_lora: int = 512
    rope: int = 64
    page: int = 64
    top_k: int = 8
    slots: int = 48
    matrices: tuple[tuple[int, int], ...] = ((1536, 7168), (12288, 1536), (7168, 8192), (2048, 7168))


@dataclass(frozen=True)
class Case:
    """Launches that do the same work on other data each, and the bytes and operations of one of them."""

    name: str
    nbytes: int
    operations: int
    launches: list[Callable[[], object]]


@dataclass(frozen=True)
class Result:
    """What one launch took. Units: us, 10^9 bytes and 10^12 operations per second, share of 1."""

    name: str
    us: float
    gbps: float
    tflops: float
    share_of_floor: float


def experts_cases(widths: Widths, device: torch.device) -> Iterator[Case]:
    """Decode batches whose tokens all choose other experts, and prompts that choose from few."""
    from hybrid_k2.accelerator.kernels.grouping import group_tokens
    from hybrid_k2.accelerator.kernels.int4_experts import DECODE, PREFILL, add_experts, expert_bytes

    size = expert_bytes(widths.hidden, widths.intermediate)
    experts = torch.randint(0, 64, (widths.slots, size), dtype=torch.uint8, device=device)  # scales below 1
    every = torch.arange(widths.slots, dtype=torch.int32, device=device)
    for tokens, tiling, used in (
        (1, DECODE, 8),
        (4, DECODE, 32),
        (16, DECODE, 32),
        (512, PREFILL, 16),
        (2048, PREFILL, 16),
    ):
        x = torch.randn(tokens, widths.hidden, device=device).bfloat16()
        weights = torch.rand(tokens, widths.top_k, device=device)
        launches = []
        for first in range(0, widths.slots - used + 1, used):
            choice = (torch.arange(tokens * widths.top_k, device=device) % used + first).view(tokens, -1)
            grouping = group_tokens(choice, weights, every, widths.slots, tiling.tokens)
            out = torch.zeros(tokens, widths.hidden, device=device)
            launches.append(
                lambda out=out, x=x, grouping=grouping, tiling=tiling: add_experts(
                    out, x, experts, grouping, widths.intermediate, tiling
                )
            )
        operations = 2 * tokens * widths.top_k * 3 * widths.hidden * widths.intermediate
        yield Case(
            f"experts, {tokens} tokens, {used} experts", min(used, tokens * widths.top_k) * size, operations, launches
        )


def attention_cases(widths: Widths, device: torch.device) -> Iterator[Case]:
    """One and several sequences behind short and long contexts."""
    from hybrid_k2.accelerator.kernels.mla_decode import mla_decode

    latent = widths.kv_lora + widths.rope
    for rows, length in ((1, 1024), (1, 8192), (1, 65536), (8, 8192)):
        pages = rows * -(-length // widths.page)
        nbytes = rows * length * latent * 2
        sets = max(1, -(-COLD_BYTES // nbytes))
        cache = torch.randn(pages * sets, widths.page, latent, device=device).bfloat16()
        q = torch.randn(rows, widths.heads, latent, device=device).bfloat16()
        lengths = torch.full((rows,), length, dtype=torch.int32, device=device)
        first = torch.arange(rows, dtype=torch.int32, device=device) * (pages // rows)
        tables = torch.randperm(pages * sets, device=device).int().view(sets, pages)
        launches = [
            lambda table=table, cache=cache, q=q, first=first, lengths=lengths: mla_decode(
                q, cache, table, first, lengths, 0.1, widths.kv_lora
            )
            for table in tables
        ]
        operations = 2 * rows * widths.heads * length * (latent + widths.kv_lora)
        yield Case(f"attention, {rows} x {length} tokens", nbytes, operations, launches)


def dense_cases(widths: Widths, device: torch.device) -> Iterator[Case]:
    """The projections of attention and a shared expert's gate, in each dtype."""
    from hybrid_k2.accelerator.kernels.weight_only import (
        DECODE,
        PREFILL,
        WeightOnly,
        from_int8,
        quantize_fp8,
        weight_only_linear,
    )

    has_fp8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_FROM
    for rows, inputs in widths.matrices:
        plain = torch.randn(rows, inputs)
        for dtype in ("int8", "fp8") if has_fp8 else ("int8",):
            packed = from_int8(quantize_int8(plain)) if dtype == "int8" else quantize_fp8(plain)
            sets = max(1, -(-COLD_BYTES // packed.nbytes)) if device.type == "cuda" else 1
            copies = [WeightOnly(packed.values.to(device), packed.scales.to(device)) for _ in range(sets)]
            for tokens, tiling in ((1, DECODE), (16, DECODE), (2048, PREFILL)):
                x = torch.randn(tokens, inputs, device=device).bfloat16()
                launches = [lambda x=x, w=w, tiling=tiling: weight_only_linear(x, w, tiling) for w in copies]
                name = f"{dtype} [{rows}, {inputs}], {tokens} tokens"
                yield Case(name, packed.nbytes, 2 * tokens * rows * inputs, launches)


CASES = {"experts": experts_cases, "attention": attention_cases, "dense": dense_cases}


def time_us(launches: list[Callable[[], object]], rounds: int) -> list[float]:
    """Time one launch in each round: all of them are captured in one graph."""
    for launch in launches[:2]:
        launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(launches))
    return times


def measure_limits(rounds: int) -> tuple[float, float]:
    """Return the card's copy bandwidth and its rate of bf16 products. Units: bytes and operations per second."""
    source = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copy_us = min(time_us([lambda: target.copy_(source)], rounds))
    side = 8192
    a, b = (torch.randn(side, side, device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    product_us = min(time_us([lambda: torch.mm(a, b, out=product)], rounds))
    return 2 * source.nbytes / copy_us * 1e6, 2 * side**3 / product_us * 1e6


def result(case: Case, times: list[float], limits: tuple[float, float]) -> Result:
    """Compare with the floor."""
    seconds = median(times) * 1e-6
    floor = max(case.nbytes / limits[0], case.operations / limits[1])
    rates = (case.nbytes / seconds / 1e9, case.operations / seconds / 1e12)
    return Result(case.name, seconds * 1e6, *rates, floor / seconds)


def run(names: list[str], rounds: int) -> dict[str, Any]:
    """Measure; limits before and after, the better of each."""
    first = measure_limits(rounds)
    timed = [
        (Case(case.name, case.nbytes, case.operations, []), time_us(case.launches, rounds))
        for name in names
        for case in CASES[name](Widths(), torch.device("cuda"))
    ]
    limits = tuple(max(pair) for pair in zip(first, measure_limits(rounds), strict=True))
    return {
        "device": torch.cuda.get_device_name(),
        "copy_gbps": limits[0] / 1e9,
        "product_tflops": limits[1] / 1e12,
        "results": [asdict(result(case, times, (limits[0], limits[1]))) for case, times in timed],
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - CASES.keys():
        sys.exit(f"error: --only: expected some of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available() or not have_triton():
        missing = "triton" if torch.cuda.is_available() else "a CUDA device that torch can use"
        sys.exit(f"error: the GPU kernels need {missing}, got none; there is nothing to measure")
    torch.manual_seed(0)
    report = run(names, args.rounds)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{report['device']}: copy {report['copy_gbps']:.0f} GB/s, product {report['product_tflops']:.0f} TFLOPS")
    print(f"{'case':40}         us    GB/s  TFLOPS  of the floor")
    for r in report["results"]:
        print(f"{r['name']:40} {r['us']:10.1f} {r['gbps']:7.0f} {r['tflops']:7.1f} {r['share_of_floor']:13.0%}")


if __name__ == "__main__":
    main()

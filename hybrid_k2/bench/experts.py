"""One MoE layer of routed experts, timed against the memory's read bandwidth and the peak of its instructions.

A floor is the time that the hardware needs at least: max(bytes of the touched experts / raw read bandwidth, operations
/ peak rate of the multiplying instruction). Rounds of all cases are interleaved with probes of both rates, so that a
busy neighbour or a falling clock meets the limit as well as the kernel; medians are over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hybrid_k2.checkpoint import ExpertWeights, PackedWeight
from hybrid_k2.config import INT4_GROUP
from hybrid_k2.errors import IsaError
from hybrid_k2.experts import ExpertsBackend, ExpertsShape
from hybrid_k2.experts.base import distinct_experts
from hybrid_k2.experts.cpu import NativeRuntime, native_isas
from hybrid_k2.experts.isa import choose_isa, forced_isa
from hybrid_k2.experts.reference import expert_ffn
from hybrid_k2.experts.tuning import Tuning
from hybrid_k2.host.threads import NodeThreads
from hybrid_k2.native import NATIVE_ERROR

# Experts share the values of this many: new random numbers take longer than the packing. In memory each has its own.
DISTINCT_WEIGHTS = 4
CHECKED_TOKENS = 2  # of each batch, compared with float64
ROUNDS = 5
PROBE_SECONDS = 0.05
BYTES_PER_32_WEIGHTS = 18


@dataclass(frozen=True)
class ExpertsResult:
    """What one number of tokens took. Units: ms per layer, 10^9 bytes or operations per second, shares of 1."""

    tokens: int
    numerics: str
    isa: str
    threads: int
    ms: float
    gbps: float
    gops: float
    distinct_experts: int
    share_of_floor: float
    error: float


@dataclass(frozen=True)
class ExpertsReport:
    """All results of a run, with the limits measured in it."""

    raw_read_gbps: float
    peak_gops: dict[str, float]
    tuning: dict[str, Tuning]
    results: tuple[ExpertsResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `--json`."""
        return asdict(self)

    def table(self) -> str:
        """Write the report as aligned text."""
        peaks = ", ".join(f"{name} {gops:.0f} GOPS" for name, gops in self.peak_gops.items())
        lines = [
            f"raw read {self.raw_read_gbps:.1f} GB/s; peaks: {peaks}",
            *(f"{name}: {tuning}" for name, tuning in self.tuning.items()),
            "numerics  tokens  experts         ms     GB/s    GOPS  of the floor    error",
        ]
        for r in self.results:
            lines.append(
                f"{r.numerics:<8} {r.tokens:>7} {r.distinct_experts:>8} {r.ms:>10.2f} {r.gbps:>8.1f} {r.gops:>7.0f}"
                f" {r.share_of_floor:>13.0%}  {r.error:.1e}"
            )
        return "\n".join(lines)


class _Case:
    """One number of tokens in one numerics: its inputs, and what its rounds took."""

    def __init__(self, bench: RandomExperts, numerics: str, tokens: int) -> None:
        self.bench = bench
        self.numerics = numerics
        self.tokens = tokens
        self.distinct: list[int] = []
        self.seconds: list[float] = []
        self.shares: list[float] = []
        self.error = 0.0

    def round(self, layer: ExpertsBackend, raw_gbps: float, peak_gops: float) -> None:
        """Time one call with fresh routing and compare it with the limits of this moment."""
        ids, weights = self.bench.route(self.tokens)
        hidden = self.bench.hidden[: self.tokens]
        start = time.perf_counter()
        out = layer.forward(hidden, ids, weights)
        seconds = time.perf_counter() - start
        distinct = len(distinct_experts(ids))
        floor = max(distinct * self.bench.expert_bytes / raw_gbps, self.operations / peak_gops) / 1e9
        self.distinct.append(distinct)
        self.seconds.append(seconds)
        self.shares.append(floor / seconds)
        self.error = max(self.error, self.bench.error(out, ids, weights))

    def forget(self) -> None:
        """Drop the rounds so far."""
        for values in (self.distinct, self.seconds, self.shares):
            values.clear()

    @property
    def operations(self) -> float:
        """Multiplications and additions of one call."""
        shape = self.bench.shape
        return 6.0 * self.tokens * shape.num_experts_per_tok * shape.hidden_size * shape.moe_intermediate_size

    def result(self, isa: str, threads: int) -> ExpertsResult:
        """Sum up the rounds."""
        seconds, distinct = median(self.seconds), round(median(self.distinct))
        return ExpertsResult(
            tokens=self.tokens,
            numerics=self.numerics,
            isa=isa,
            threads=threads,
            ms=seconds * 1e3,
            gbps=distinct * self.bench.expert_bytes / seconds / 1e9,
            gops=self.operations / seconds / 1e9,
            distinct_experts=distinct,
            share_of_floor=median(self.shares),
            error=self.error,
        )


class RandomExperts:
    """Random weights, inputs and the right answers for the checked tokens."""

    def __init__(self, shape: ExpertsShape, most_tokens: int, seed: int) -> None:
        self.shape = shape
        self.random = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(most_tokens, shape.hidden_size, generator=self.random).to(torch.bfloat16)
        self.weights = [self.random_expert() for _ in range(min(DISTINCT_WEIGHTS, shape.n_routed_experts))]
        checked = self.hidden[:CHECKED_TOKENS].double()
        self.right = torch.stack([expert_ffn(weights, checked) for weights in self.weights])  # [W, checked, H]
        self.next_expert = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert: INT4 values and bf16 scales."""
        return 3 * self.shape.hidden_size * self.shape.moe_intermediate_size * BYTES_PER_32_WEIGHTS // 32

    def random_expert(self) -> ExpertWeights:
        """Draw values and scales of about the size of real ones."""

        def matrix(rows: int, columns: int) -> PackedWeight:
            words = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int32, generator=self.random)
            scale = torch.rand(rows, columns // INT4_GROUP, generator=self.random).add_(0.5).mul_(0.01)
            return PackedWeight(words, scale.to(torch.bfloat16))

        hidden, inner = self.shape.hidden_size, self.shape.moe_intermediate_size
        return ExpertWeights(matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner))

    def load(self, layer: ExpertsBackend) -> None:
        """Fill a layer."""
        for expert in range(self.shape.n_routed_experts):
            layer.load_expert(expert, self.weights[expert % len(self.weights)])

    def route(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Draw different experts for each token, the first one's in turn, so that one token finds them cold.

        Shapes: -> ids [tokens, K] int32, weights [tokens, K] fp32.
        """
        experts, k = self.shape.n_routed_experts, self.shape.num_experts_per_tok
        ids = torch.rand(tokens, experts, generator=self.random).topk(k).indices.to(torch.int32)
        ids[0] = (torch.arange(k) + self.next_expert) % experts
        self.next_expert = (self.next_expert + k) % experts
        return ids, torch.rand(tokens, k, generator=self.random)

    def error(self, out: Tensor, ids: Tensor, weights: Tensor) -> float:
        """Return the root mean square error of the checked tokens, relative to their right answers."""
        count = min(CHECKED_TOKENS, len(out))
        rows = torch.arange(count)[:, None]
        used = self.right[ids[:count].long() % len(self.weights), rows]  # [checked, K, H]
        right = (used * weights[:count, :, None].double()).sum(1)
        return float((out[:count].double() - right).norm() / right.norm())


def memory_bytes(shape: ExpertsShape, most_tokens: int) -> int:
    """Estimate what a run takes: the layer, the shared values, one expert in float64, activations, the read probe."""
    weights = shape.n_routed_experts + DISTINCT_WEIGHTS
    expert = 3 * shape.hidden_size * shape.moe_intermediate_size
    activations = most_tokens * (12 * shape.hidden_size + 4 * shape.num_experts_per_tok * shape.moe_intermediate_size)
    activations += most_tokens * (4 * shape.n_routed_experts + 24 * shape.num_experts_per_tok)  # drawing the routes
    return weights * expert * BYTES_PER_32_WEIGHTS // 32 + 12 * expert + activations + (1 << 30)


def measure_experts(
    shape: ExpertsShape,
    tokens: Sequence[int],
    numerics: Sequence[str],
    isa: str | None,
    nodes: Sequence[NodeThreads],
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> ExpertsReport:
    """Measure a layer of random experts for each numerics and number of tokens.

    Memory: the layer's weights once for each numerics at a time, and inputs and outputs.
    isa: None takes the best one that has the numerics. nodes: the threads, as an engine would spread them.
    Raises: ValueError for sizes that the kernels do not take; IsaError for an instruction set that is not there or
    lacks the numerics; MemoryError.
    """
    isas = {name: _choose(isa, name) for name in numerics}
    bench = RandomExperts(shape, max(tokens), seed)
    raw: list[float] = []
    peaks: dict[str, float] = {}
    tunings: dict[str, Tuning] = {}
    results: list[ExpertsResult] = []
    for name in numerics:
        with _layer(bench, name, isas[name], nodes) as (runtime, layer):
            tunings[name] = runtime.tuning
            peak: list[float] = []
            cases = [_Case(bench, name, count) for count in tokens]
            for number in range(rounds + 1):
                progress(f"{name}, round {number} of {rounds}" if number else f"{name}, warming up")
                for case in cases:
                    raw.append(runtime.measure_read_gbps(PROBE_SECONDS))
                    peak.append(runtime.measure_peak_gops(PROBE_SECONDS))
                    case.round(layer, raw[-1], peak[-1])
                    if number == 0:  # threads, pages and clocks were not awake yet
                        case.forget()
            peaks[name] = median(peak)
            results += [case.result(runtime.isa, sum(node.threads for node in nodes)) for case in cases]
    return ExpertsReport(median(raw), peaks, tunings, tuple(results))


def _choose(isa: str | None, numerics: str) -> str:
    facts = native_isas()
    if not facts:
        raise IsaError(
            f"bench experts: expected the native kernels, got none: {NATIVE_ERROR}",
            hint="install g++ 11 or newer and reinstall hybrid-k2",
        )
    if isa is None:
        return choose_isa(facts, forced_isa(), numerics)
    return choose_isa(facts, isa, numerics, forced_by="--isa")


@contextmanager
def _layer(
    bench: RandomExperts, numerics: str, isa: str, nodes: Sequence[NodeThreads]
) -> Iterator[tuple[NativeRuntime, ExpertsBackend]]:
    runtime = NativeRuntime(isa, sum(node.threads for node in nodes), numerics, nodes)
    try:
        runtime.tuning = runtime.measure_tuning()
        layer = runtime.make_layer(**vars(bench.shape))
        try:
            bench.load(layer)
            yield runtime, layer
        finally:
            layer.close()
    finally:
        runtime.close()

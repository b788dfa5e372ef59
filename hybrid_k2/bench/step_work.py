"""What a step of a model reads and computes at least, from its plan and the experts that were chosen in it.

A floor is the time that the host needs at least: max(bytes / raw read bandwidth, operations / peak rates). Not counted
is attention to the tokens before, beyond reading their latents; what a GPU holds is counted in bytes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrid_k2.experts.usage import ExpertUse
from hybrid_k2.placement import Plan, PlanRow
from hybrid_k2.placement.groups import (
    decoded_bytes,
    expert_parameters,
    group_bytes,
    group_parameters,
    latent_bytes_per_token,
)
from hybrid_k2.placement.memories import HOST, memory_of

EXPERTS = "experts"  # the instructions of their numerics; those of dense groups are named by dtype
DENSE_DTYPES = ("bf16", "int8")  # whose instructions have a probe


@dataclass(frozen=True)
class Limits:
    """What the host can do at best: 10^9 bytes per second, 10^9 operations per second by kind; None: not known."""

    read_gbps: float | None
    peak_gops: Mapping[str, float]


@dataclass
class StepWork:
    """Bytes that are read by memory, operations of the host by kind, and distinct experts of each MoE layer."""

    read_bytes: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    distinct: list[int] = field(default_factory=list)

    def floor_s(self, limits: Limits) -> float | None:
        """Return the least time on the host, by the limits that are known; None without a bandwidth."""
        if limits.read_gbps is None:
            return None
        peaks = limits.peak_gops
        computing = sum(count / peaks[kind] for kind, count in self.operations.items() if kind in peaks)
        return max(self.read_bytes.get(HOST, 0) / limits.read_gbps, computing) / 1e9

    def read(self, memory: str, nbytes: int) -> None:
        """Add bytes."""
        self.read_bytes[memory] = self.read_bytes.get(memory, 0) + nbytes

    def compute(self, kind: str, operations: int) -> None:
        """Add operations."""
        self.operations[kind] = self.operations.get(kind, 0) + operations


def step_work(
    plan: Plan,
    *,
    tokens: int,
    cached: int,
    logits: int,
    before: Mapping[int, ExpertUse],
    after: Mapping[int, ExpertUse],
) -> StepWork:
    """Count the work of a step.

    tokens: computed, of all sequences. cached: tokens before them. logits: rows of the head. before, after: how often
    each expert had been chosen, by layer. Where counts were halved in between, too few experts are seen.
    """
    work = StepWork()
    for row in plan.rows:
        if row.what == "routed_experts":
            _add_experts(work, plan, row, before, after)
        else:
            _add_dense(work, plan, row, tokens, logits)
    cache = plan.kv_cache
    work.read(memory_of(cache.device), cached * latent_bytes_per_token(plan.config, cache.dtype))
    work.distinct = [len(_chosen(before[layer], after[layer])) for layer in sorted(after)]
    return work


def _chosen(before: ExpertUse, after: ExpertUse) -> dict[int, int]:
    """Return how often each chosen expert was."""
    pairs = enumerate(zip(before.counts, after.counts, strict=True))
    return {expert: now - then for expert, (then, now) in pairs if now > then}


def _add_experts(
    work: StepWork, plan: Plan, row: PlanRow, before: Mapping[int, ExpertUse], after: Mapping[int, ExpertUse]
) -> None:
    config, memory = plan.config, memory_of(row.device)
    expert_bytes = group_bytes(config, row.what, row.dtype) // config.n_routed_experts
    for layer in row.layers or ():
        hot = set(after[layer].hot)
        chosen = _chosen(before[layer], after[layer])
        here = [count for expert, count in chosen.items() if (expert in hot) == bool(row.hottest)]
        work.read(memory, len(here) * expert_bytes)
        if memory == HOST and plan.stream == "off":  # streamed ones are read on the host and computed elsewhere
            work.compute(EXPERTS, 2 * sum(here) * expert_parameters(config))


def _add_dense(work: StepWork, plan: Plan, row: PlanRow, tokens: int, logits: int) -> None:
    config, memory, layers = plan.config, memory_of(row.device), len(row.layers or (0,))
    nbytes = layers * decoded_bytes(config, row.what, row.dtype)
    if row.what == "embedding":
        work.read(memory, tokens * nbytes)
        return
    rows = logits if row.what == "lm_head" else tokens
    if rows:
        work.read(memory, nbytes)
    if memory == HOST and nbytes and row.dtype in DENSE_DTYPES:
        work.compute(row.dtype, 2 * rows * layers * group_parameters(config, row.what))

"""CPU, memory and what they allow: cores, limits of control groups, pages, read bandwidth, and K2.6 beside them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from hybrid_k2.bench.slice import k26_config
from hybrid_k2.cli.doctor.finding import OK, WARNING, Finding
from hybrid_k2.errors import MemoryBudgetError
from hybrid_k2.experts import open_experts
from hybrid_k2.host.cgroup import cgroup_memory
from hybrid_k2.host.cpu import cpu_model
from hybrid_k2.host.huge_pages import SETTING, transparent_huge_pages
from hybrid_k2.host.threads import spread_threads
from hybrid_k2.placement import Machine, Plan, default_rules, make_plan, shipped_rules
from hybrid_k2.placement.draft import draft_plan
from hybrid_k2.placement.memories import HOST
from hybrid_k2.placement.plan import bytes_per_token
from hybrid_k2.placement.sizes import format_bytes

PROBE_SECONDS = 0.2
ROOT = Path("/")


def check_cpu(machine: Machine, root: Path = ROOT) -> Iterator[Finding]:
    """Name the CPU, and what this process may use of it."""
    nodes = len(machine.nodes)
    cores = f"{machine.cores} core{'s' * (machine.cores > 1)} for this process"
    name = cpu_model(root) or platform.machine() or "a CPU without a name"
    parts = [name, cores, f"{nodes} NUMA nodes" if nodes > 1 else "one NUMA node"]
    if machine.cpu_quota:
        parts.append("a control group limits its CPU time")
    text = ", ".join(parts)
    if nodes > 1 and machine.numa_balancing:
        yield Finding(
            "cpu",
            WARNING,
            f"{text}; kernel.numa_balancing is on and may move weights between nodes",
            "sudo sysctl kernel.numa_balancing=0 while a model runs",
        )
    else:
        yield Finding("cpu", OK, text)


def check_memory(machine: Machine, root: Path = ROOT) -> Iterator[Finding]:
    """Say how much memory there is, who limits it, and whether large pages are to be had."""
    free, total = machine.host_available_bytes, machine.host_memory_bytes
    limits = [limit for limit, _ in cgroup_memory(root)]
    limit = f"; a control group allows {format_bytes(min(limits))}" if limits else ""
    yield Finding("memory", OK, f"{format_bytes(free)} of {format_bytes(total)} free{limit}")
    pages = transparent_huge_pages(root)
    if pages == "never":
        yield Finding(
            "huge pages",
            WARNING,
            "never: weights lie on small pages, and reading them may take a quarter longer",
            f"echo madvise | sudo tee /{SETTING}",
        )
    else:
        yield Finding("huge pages", OK, pages or "the system does not say")


def check_bandwidth(machine: Machine) -> Iterator[Finding]:
    """Measure how fast all cores read memory, and say what that makes of K2.6; then whether K2.6 would fit."""
    config = k26_config()
    alone = draft_plan(shipped_rules(HOST), config, machine)  # also where it is too large for this machine
    routed = bytes_per_token(config, tuple(row for row in alone.rows if row.what == "routed_experts"))
    try:
        gbps = _read_gbps(machine)
    except (MemoryBudgetError, MemoryError) as error:
        yield Finding("bandwidth", WARNING, f"not measured: {str(error).splitlines()[0]}", "free host memory")
    else:
        yield Finding(
            "bandwidth",
            OK,
            f"{gbps:.1f} GB/s read by {machine.cores} thread{'s' * (machine.cores > 1)}; K2.6 decodes at most "
            f"{_speed(gbps, alone.bytes_per_token)} on the host alone, {_speed(gbps, routed)} with all but the routed "
            "experts on a GPU",
        )
    try:
        plan = make_plan(default_rules(machine, config), config, machine)
    except MemoryBudgetError as error:
        yield Finding("K2.6", WARNING, f"does not fit: {error.message}", error.hint)
    else:
        yield Finding("K2.6", OK, f"fits: {describe_plan(plan)}")


def describe_plan(plan: Plan) -> str:
    """Say which rules a plan follows and what it takes of each memory."""
    sizes = ", ".join(f"{format_bytes(plan.bytes_on(device))} on {device}" for device in plan.devices)
    return f"{sizes}, by {plan.rules.source}"


def _read_gbps(machine: Machine) -> float:
    nodes = spread_threads(machine.cores, machine.core_cpus, machine.nodes, own=not machine.cpu_quota)
    with closing(open_experts("exact", machine.cores, nodes=nodes)) as runtime:
        return runtime.measure_read_gbps(PROBE_SECONDS)


def _speed(gbps: float, nbytes: int) -> str:
    return f"{gbps * 1e9 / nbytes:.2g} tokens/s"

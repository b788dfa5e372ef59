"""How many threads the host's work gets, and where they run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybrid_k2.host.threads import NodeThreads, node_shares, spread_threads, virtual_nodes
from hybrid_k2.placement.form import Rules
from hybrid_k2.placement.machine import Machine
from hybrid_k2.placement.sizes import format_bytes
from hybrid_k2.placement.yaml_tree import fail

# Per token, one thread reads this in about 0.3 ms. The hand-offs of a token between threads cost some 0.1 ms on a quiet
# machine, and many times that on a busy one: less work than this is not worth another thread.
BYTES_PER_THREAD = 4 << 20


@dataclass(frozen=True)
class ThreadPlan:
    """Spread the host's threads. nodes: of the experts, at least one; notes: what the user should know."""

    nodes: tuple[NodeThreads, ...]
    notes: tuple[str, ...] = ()
    twin_threads: int = 0


def plan_threads(
    rules: Rules, machine: Machine, *, bytes_per_token: int, expert_bytes: int, gpu: bool, twin_share: float | None
) -> ThreadPlan:
    """Choose the threads by the rules, or by the machine where they leave it open.

    bytes_per_token: weights that a token reads. expert_bytes: of the routed experts on the host, which the nodes share.
    gpu: something is on a GPU. twin_share: which part of the multiplications the twin does; None without one.
    Raises: RulesError: more threads for the twin than leave a core to the experts, where the rules leave the sum open.
    """
    threads = rules.devices.host_threads or _auto_threads(machine.cores, bytes_per_token, gpu)
    twin = 0
    if twin_share is not None:
        _check_twin_threads(rules, machine)
        twin = rules.devices.twin_threads or _auto_twin_threads(threads, twin_share)
    plan = replace(_spread(rules, machine, max(1, threads - twin), expert_bytes), twin_threads=twin)
    if threads > machine.cores:  # as the rules say: on their own they are no more than cores
        plan = replace(plan, notes=(*plan.notes, f"threads: {threads} take turns on the {machine.cores} cores at hand"))
    return plan


def _check_twin_threads(rules: Rules, machine: Machine) -> None:
    """Refuse a twin that takes all cores; where the rules state the host's threads, they have been compared."""
    devices, most = rules.devices, max(1, machine.cores - 1)
    if devices.host_threads is None and (devices.twin_threads or 0) > most:
        fail(
            rules.source,
            devices.twin_threads_line,
            f"devices: twin_threads: expected at most {most} (of the {machine.cores} cores at hand, one is for the "
            f"experts), got {devices.twin_threads}",
            "for more threads than cores, state their sum: host: {threads: N}",
        )


def _auto_twin_threads(threads: int, share: float) -> int:
    """Let both sides end at the same time: threads by multiplications, but at most half, and one at least."""
    return max(1, min(round(threads * share), threads // 2))


def _spread(rules: Rules, machine: Machine, threads: int, expert_bytes: int) -> ThreadPlan:
    """Spread the experts' threads over nodes."""
    numa = rules.devices.host_numa
    notes: tuple[str, ...] = ()
    if isinstance(numa, int):
        if numa > threads:
            notes = (f"numa: {numa} virtual nodes take {numa} threads, where {threads} have work",)
        return ThreadPlan(virtual_nodes(max(threads, numa), numa), notes)
    if numa == "off":
        return ThreadPlan((NodeThreads(threads),))
    nodes = machine.nodes
    share = expert_bytes // max(1, len(nodes))
    if len(nodes) > 1 and any(node.free_bytes < share for node in nodes):
        least = min(nodes, key=lambda node: node.free_bytes)
        notes = (
            f"numa: node {least.number} has {format_bytes(least.free_bytes)} free and its share of the routed experts "
            f"is {format_bytes(share)}, so the nodes are not told apart (slower)",
        )
        nodes = ()
    if 1 < len(nodes) <= threads and node_shares(threads, nodes) is None:
        least = min(nodes, key=lambda node: len(node.cores))
        notes = (
            f"numa: node {least.number} has {len(least.cores)} of {machine.cores} cores, too few for an equal part of "
            "the routed experts, so the nodes are not told apart (slower)",
        )
    spread = spread_threads(threads, machine.core_cpus, nodes, own=not machine.cpu_quota)
    if len(spread) > 1 and machine.numa_balancing:
        notes = ("numa: kernel.numa_balancing is on and may move weights between nodes; turn it off while this runs",)
    return ThreadPlan(spread, notes)


def _auto_threads(cores: int, bytes_per_token: int, gpu: bool) -> int:
    """Use every core, but no more threads than have work: a small model loses more to their hand-offs than it gains.

    On a large machine some cores are left to the interpreter, and to the thread that feeds a GPU.
    """
    return max(1, min(cores - _spare_cores(cores, gpu), bytes_per_token // BYTES_PER_THREAD))


def _spare_cores(cores: int, gpu: bool) -> int:
    """Leave what costs the experts little: memory is the limit, and one core of 16 adds nothing to it."""
    if cores >= 16:
        return 2 if gpu else 1
    return 1 if gpu and cores >= 4 else 0

"""How the threads of the experts are spread over NUMA nodes and cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_k2.host.topology import HostNode

Cpus = tuple[int, ...]


@dataclass(frozen=True)
class NodeThreads:
    """Name the threads of one node, which hold and compute a slice of every expert.

    node: the NUMA node whose memory the slice is in; None: anywhere (one node, or a virtual one).
    cpus: where each thread may run; empty: wherever the process may.
    """

    threads: int
    node: int | None = None
    cpus: tuple[Cpus, ...] = ()

    def __post_init__(self) -> None:
        if self.threads < 1 or len(self.cpus) not in (0, self.threads):
            raise ValueError(f"NodeThreads: expected threads >= 1 and CPUs for all or none of them, got {self!r}")


def virtual_nodes(threads: int, nodes: int) -> tuple[NodeThreads, ...]:
    """Divide threads among nodes that differ in nothing: what several nodes compute, on any machine.

    Raises: ValueError: fewer threads than nodes.
    """
    return tuple(NodeThreads(count) for count in shares(threads, nodes))


def spread_threads(
    threads: int, cores: Sequence[Cpus], nodes: Sequence[HostNode], *, own: bool
) -> tuple[NodeThreads, ...]:
    """Divide threads among the real nodes; each stays on its node, and on a core of its own where there are enough.

    cores: all that the process may use. nodes: theirs; none or one means there is nothing to divide. Nodes that cannot
    do equal parts of the work (`node_shares`) are not told apart.
    own: nobody else is given these cores, as far as the process can know (no quota on its CPU time).
    """
    counts = node_shares(threads, nodes) if 1 < len(nodes) <= threads else None
    if counts is None:
        return (NodeThreads(threads, cpus=_own_cores(threads, cores) if own else ()),)
    return tuple(
        NodeThreads(count, node.number, (_own_cores(count, node.cores) if own else ()) or _anywhere(count, node))
        for node, count in zip(nodes, counts, strict=True)
    )


def node_shares(threads: int, nodes: Sequence[HostNode]) -> list[int] | None:
    """Cut a number of threads into one number per node: as equal as they go, but no more than a node has cores.

    Threads beyond all cores are spread equally on top. None where a node would get less than half of an equal share:
    every node computes an equal part of each expert, so all would wait for that one, longer than for far memory.
    """
    counts = [min(count, len(node.cores)) for count, node in zip(shares(threads, len(nodes)), nodes, strict=True)]
    left = threads - sum(counts)
    for i, node in enumerate(nodes):
        more = min(left, len(node.cores) - counts[i])
        counts[i] += more
        left -= more
    if 2 * min(counts) * len(nodes) < sum(counts):
        return None
    return [count + more for count, more in zip(counts, shares(left, len(nodes)), strict=True)]


def shares(threads: int, nodes: int) -> list[int]:
    """Cut a number of threads into one number per node, as equal as they go."""
    return [threads * (node + 1) // nodes - threads * node // nodes for node in range(nodes)]


def _own_cores(threads: int, cores: Sequence[Cpus]) -> tuple[Cpus, ...]:
    """Give each thread one physical core, from the last: the first ones serve interrupts and other programs.

    Only where the threads take more than half of the cores. Fewer would meet the threads of other programs that choose
    the same way, while other cores idle; the kernel places them better.
    """
    return tuple(cores[len(cores) - threads :]) if len(cores) < 2 * threads <= 2 * len(cores) else ()


def _anywhere(threads: int, node: HostNode) -> tuple[Cpus, ...]:
    return (tuple(cpu for core in node.cores for cpu in core),) * threads

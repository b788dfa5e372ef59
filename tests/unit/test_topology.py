"""Cores and NUMA nodes from written trees of /sys, and how threads are spread over them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hybrid_k2.host.threads import NodeThreads, node_shares, shares, spread_threads, virtual_nodes
from hybrid_k2.host.topology import HostNode, host_nodes, numa_balancing, parse_list, physical_cores

GIB = 1 << 30
CPU = "sys/devices/system/cpu/cpu{}/topology/core_cpus_list"
NODE = "sys/devices/system/node/node{}/{}"


def write(root: Path, **files: object) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def meminfo(node: int, free: int, file_pages: int = 0) -> str:
    return (
        f"Node {node} MemTotal:       99999999 kB\nNode {node} MemFree:        {free // 1024} kB\n"
        f"Node {node} Active(file):   {file_pages // 2048} kB\nNode {node} Inactive(file): {file_pages // 2048} kB\n"
        f"Node {node} Active(anon):   77 kB"
    )


def server(root: Path, cores_per_node: int = 4, nodes: int = 2) -> Path:
    """Hyper-threads as Linux numbers them: CPU i and i + cores are one core."""
    cores = cores_per_node * nodes
    files: dict[str, object] = {}
    for core in range(cores):
        for cpu in (core, core + cores):
            files[CPU.format(cpu)] = f"{core},{core + cores}"
    for node in range(nodes):
        first = node * cores_per_node
        last = first + cores_per_node - 1
        files[NODE.format(node, "cpulist")] = f"{first}-{last},{first + cores}-{last + cores}"
        files[NODE.format(node, "meminfo")] = meminfo(node, (node + 1) * GIB, 2 * GIB)
    return write(root, **files, **{"sys/devices/system/node/possible": "0-7", "sys/devices/system/node/node9x/x": ""})


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0-3,8", {0, 1, 2, 3, 8}),
        ("5\n", {5}),
        ("", set()),
        ("\n", set()),
        ("7-5", set()),
        ("x,2,-,3-", {2}),
    ],
)
def test_lists_of_numbers(text: str, numbers: set[int]) -> None:
    assert parse_list(text) == numbers


def test_nodes_with_cores_and_free_memory(tmp_path: Path) -> None:
    nodes = host_nodes(server(tmp_path), set(range(16)))
    assert nodes == (
        HostNode(0, ((0, 8), (1, 9), (2, 10), (3, 11)), 3 * GIB),
        HostNode(1, ((4, 12), (5, 13), (6, 14), (7, 15)), 4 * GIB),
    )


def test_affinity_leaves_some_cores_or_one_node(tmp_path: Path) -> None:
    server(tmp_path)
    assert [node.cores for node in host_nodes(tmp_path, {1, 2, 9, 15})] == [((1, 9), (2,)), ((15,),)]
    assert [node.number for node in host_nodes(tmp_path, {4, 5})] == [1]


def test_a_node_whose_memory_is_forbidden_makes_the_nodes_useless(tmp_path: Path) -> None:
    write(server(tmp_path), **{"proc/self/status": "Name:\tx\nMems_allowed:\t1\nMems_allowed_list:\t0"})
    assert host_nodes(tmp_path, set(range(16))) == ()
    assert [node.number for node in host_nodes(tmp_path, {0, 1})] == [0]
    write(tmp_path, **{"proc/self/status": "Mems_allowed_list:\t0-1"})
    assert len(host_nodes(tmp_path, set(range(16)))) == 2


def test_memory_without_cpus_is_no_node_to_compute_on(tmp_path: Path) -> None:
    write(server(tmp_path), **{NODE.format(2, "cpulist"): "", NODE.format(2, "meminfo"): meminfo(2, GIB)})
    assert [node.number for node in host_nodes(tmp_path, set(range(16)))] == [0, 1]


def test_nothing_is_known_without_the_tree(tmp_path: Path) -> None:
    assert host_nodes(tmp_path, {0, 1}) == ()
    assert physical_cores(tmp_path, {3, 1}) == ((1,), (3,))
    write(tmp_path, **{NODE.format(0, "cpulist"): "0"})  # CPU 1 belongs nowhere
    assert host_nodes(tmp_path, {0, 1}) == ()
    assert host_nodes(tmp_path, {0}) == (HostNode(0, ((0,),), 0),)


@pytest.mark.parametrize(("content", "on"), [("0", False), ("1", True), ("2", True), ("", False)])
def test_numa_balancing(tmp_path: Path, content: str, on: bool) -> None:
    assert numa_balancing(tmp_path) is False
    assert numa_balancing(write(tmp_path, **{"proc/sys/kernel/numa_balancing": content})) is on


def test_threads_get_cores_of_their_own_on_their_node(tmp_path: Path) -> None:
    nodes = host_nodes(server(tmp_path), set(range(16)))
    cores = physical_cores(tmp_path, set(range(16)))
    spread = spread_threads(7, cores, nodes, own=True)
    assert spread == (
        NodeThreads(3, 0, ((1, 9), (2, 10), (3, 11))),  # the first core is left to others
        NodeThreads(4, 1, ((4, 12), (5, 13), (6, 14), (7, 15))),
    )
    everywhere = [(0, 8, 1, 9, 2, 10, 3, 11), (4, 12, 5, 13, 6, 14, 7, 15)]
    for threads, own in ((4, True), (8, False), (10, True), (16, False)):  # too few, a quota, more than cores
        spread = spread_threads(threads, cores, nodes, own=own)
        assert spread == tuple(NodeThreads(threads // 2, n, (everywhere[n],) * (threads // 2)) for n in (0, 1))


def test_on_one_node_nothing_is_bound_and_few_threads_go_anywhere() -> None:
    cores = tuple((core, core + 6) for core in range(6))
    for nodes in ((), (HostNode(0, cores, GIB),)):
        assert spread_threads(4, cores, nodes, own=True) == (NodeThreads(4, None, cores[2:]),)
        assert spread_threads(6, cores, nodes, own=True) == (NodeThreads(6, None, cores),)
        for threads, own in ((3, True), (1, True), (7, True), (12, True), (6, False)):
            assert spread_threads(threads, cores, nodes, own=own) == (NodeThreads(threads),)
    assert spread_threads(1, cores, (HostNode(0, cores[:3], GIB), HostNode(1, cores[3:], GIB)), own=True) == (
        NodeThreads(1),
    )  # one thread cannot be on two nodes
    assert spread_threads(2, (), (), own=True) == (NodeThreads(2),)


def nodes_of(*cores: int) -> tuple[HostNode, ...]:
    """Nodes with so many cores each."""
    return tuple(HostNode(n, tuple((100 * n + core,) for core in range(count)), GIB) for n, count in enumerate(cores))


@pytest.mark.parametrize(
    ("threads", "cores", "counts"),
    [
        (23, (14, 10), [13, 10]),
        (24, (14, 10), [14, 10]),
        (20, (4, 8, 8), [4, 8, 8]),
        (13, (8, 8), [6, 7]),
        (18, (8, 8), [9, 9]),
        (15, (14, 2), None),
        (30, (14, 2), None),
        (4, (14, 2), [2, 2]),
    ],
)
def test_a_node_gets_no_more_threads_than_cores(threads: int, cores: tuple[int, ...], counts: list[int] | None) -> None:
    nodes = nodes_of(*cores)
    everything = tuple(core for node in nodes for core in node.cores)
    assert node_shares(threads, nodes) == counts
    spread = spread_threads(threads, everything, nodes, own=True)
    assert [node.threads for node in spread] == (counts or [threads])
    if counts is None:
        assert spread == spread_threads(threads, everything, (), own=True)


def test_virtual_nodes() -> None:
    assert virtual_nodes(5, 2) == (NodeThreads(2), NodeThreads(3))
    with pytest.raises(ValueError, match="threads >= 1"):
        virtual_nodes(1, 2)
    with pytest.raises(ValueError, match="CPUs for all or none"):
        NodeThreads(2, 0, ((1,),))


def test_shares_are_as_equal_as_they_go() -> None:
    for _ in range(100):
        threads, nodes = random.randint(1, 200), random.randint(1, 12)
        parts = shares(threads, nodes)
        assert sum(parts) == threads
        assert max(parts) - min(parts) <= 1

"""The cores that this process may use, and the NUMA nodes that they and their memory belong to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

_KIB = 1024
_NODE = re.compile(r"node([0-9]{1,6})")


@dataclass(frozen=True)
class HostNode:
    """Describe one NUMA node as this process may use it.

    number: the kernel's. cores: the logical CPUs of each physical core. free_bytes: what can be taken of its memory.
    """

    number: int
    cores: tuple[tuple[int, ...], ...]
    free_bytes: int


def physical_cores(root: Path, cpus: Set[int]) -> tuple[tuple[int, ...], ...]:
    """Group logical CPUs by the physical core that they are threads of, in ascending order.

    Two threads of one core share its load ports, and a spinning second thread only slows the first.
    """
    cores: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        cores.setdefault(_siblings(root, cpu), []).append(cpu)
    return tuple(map(tuple, cores.values()))


def host_nodes(root: Path, cpus: Set[int]) -> tuple[HostNode, ...]:
    """Find the NUMA nodes of these CPUs whose memory this process may use.

    Empty where the nodes are not known, or where a CPU's own memory is forbidden: then there is nothing to divide.
    """
    memory = _allowed_memory_nodes(root)
    nodes = []
    for folder in _node_folders(root):
        number = int(folder.name[len("node") :])
        here = parse_list(_read(folder / "cpulist")) & cpus
        if here and (memory is None or number in memory):
            nodes.append(HostNode(number, physical_cores(root, here), _free_bytes(folder)))
    found = {cpu for node in nodes for core in node.cores for cpu in core}
    return tuple(nodes) if found == set(cpus) else ()


def numa_balancing(root: Path) -> bool:
    """Say whether the kernel moves pages between nodes on its own."""
    return _read(root / "proc/sys/kernel/numa_balancing").strip() not in ("", "0")


def parse_list(text: str) -> set[int]:
    """Read the kernel's lists of numbers, as `0-3,8`; what is not a list is empty."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        if match:
            numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


def _node_folders(root: Path) -> list[Path]:
    try:
        folders = [path for path in (root / "sys/devices/system/node").iterdir() if _NODE.fullmatch(path.name)]
    except OSError:
        return []
    return sorted(folders, key=lambda path: int(path.name[len("node") :]))


def _free_bytes(folder: Path) -> int:
    """Add up free and file pages: the kernel gives file pages up for a bound allocation."""
    return sum(kib * _KIB for name, kib in _meminfo(folder) if name in ("MemFree", "Active(file)", "Inactive(file)"))


def _meminfo(folder: Path) -> Iterator[tuple[str, int]]:
    for line in _read(folder / "meminfo").splitlines():  # "Node 0 MemFree:  12345 kB"
        match = re.fullmatch(r"Node [0-9]+ (\S+):\s+([0-9]+) kB", line.strip())
        if match:
            yield match[1], int(match[2])


def _allowed_memory_nodes(root: Path) -> set[int] | None:
    """Read which nodes' memory the control group leaves to this process; None when it is not said."""
    for line in _read(root / "proc/self/status").splitlines():
        if line.startswith("Mems_allowed_list:"):
            return parse_list(line.partition(":")[2])
    return None


def _siblings(root: Path, cpu: int) -> str:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the name before Linux 5.3
        if text := _read(topology / name).strip():
            return text
    return f"cpu {cpu}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

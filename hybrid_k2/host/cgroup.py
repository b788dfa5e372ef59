"""The limits that control groups set on this process: memory and CPU time, in versions 1 and 2.

A container often sees its own group as the root of the mount, while /proc/self/cgroup names the path on the host;
so each path is looked up where it says, and at the mount itself. A group is bound by its ancestors too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Version 1 says "no limit" with the largest page-aligned 63-bit number; nothing has that much memory.
_NO_LIMIT_BYTES = 1 << 60


def cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, room) in bytes for each memory group with a limit around this process.

    The page cache of a group is counted as room: the kernel drops it before it refuses memory.
    """
    for folder in _folders(root, "memory"):
        limit = _read_number(folder / "memory.max", folder / "memory.limit_in_bytes")
        if limit is None or limit >= _NO_LIMIT_BYTES:
            continue
        used = _read_number(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
        yield limit, max(0, limit - max(0, used - _page_cache_bytes(folder)))


def cgroup_cpu_limit(root: Path) -> float | None:
    """Return how many CPUs' worth of time this process may use; None without a quota."""
    limits = [limit for folder in _folders(root, "cpu") if (limit := _cpu_quota(folder)) is not None]
    return min(limits, default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the existing folders of this process's group and its ancestors, both versions."""
    mount = root / "sys/fs/cgroup"
    seen: set[Path] = set()
    for line in _read_lines(root / "proc/self/cgroup"):
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names == "":
            bases = [mount, mount / "unified"]
        elif controller in names.split(","):
            bases = [mount / controller, mount / names]
        else:
            continue
        for base in bases:
            for folder in _with_ancestors(base, path):
                if folder not in seen and folder.is_dir():
                    seen.add(folder)
                    yield folder


def _with_ancestors(base: Path, path: str) -> Iterator[Path]:
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for depth in range(len(parts), -1, -1):
        yield base.joinpath(*parts[:depth])


def _cpu_quota(folder: Path) -> float | None:
    """Read quota over period; version 2 keeps both in cpu.max, where "max" means none, version 1 in two files."""
    words = (_read_lines(folder / "cpu.max") or [""])[0].split()
    if len(words) == 2 and all(word.isdecimal() for word in words):
        quota, period = int(words[0]), int(words[1])
    else:
        quota = _read_number(folder / "cpu.cfs_quota_us") or 0
        period = _read_number(folder / "cpu.cfs_period_us") or 0
    return quota / period if quota > 0 and period > 0 else None


def _page_cache_bytes(folder: Path) -> int:
    """Sum the file pages that memory.stat counts for the group and its children."""
    stat = dict(pair for line in _read_lines(folder / "memory.stat") if len(pair := line.split()) == 2)
    names = (
        ("total_inactive_file", "total_active_file")
        if "total_inactive_file" in stat
        else ("inactive_file", "active_file")
    )
    return sum(int(stat.get(name, "0")) for name in names)


def _read_number(*paths: Path) -> int | None:
    """Read the first of the files that holds a whole number."""
    for path in paths:
        for line in _read_lines(path)[:1]:
            if line.strip().lstrip("-").isdecimal():
                return int(line)
    return None


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []

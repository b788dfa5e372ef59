"""How much memory this process can take."""

from __future__ import annotations

from pathlib import Path

from hybrid_k2.errors import HardwareError
from hybrid_k2.host.cgroup import cgroup_memory

_FIELDS = ("MemTotal", "MemAvailable")


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return total and available bytes, both bounded by the memory cgroups around this process.

    `root` holds the proc and sys trees.
    Raises: HardwareError: /proc/meminfo cannot be read.
    """
    path = root / "proc/meminfo"
    try:
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        total, available = (int(fields[name].split()[0]) * 1024 for name in _FIELDS)
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise HardwareError(f"{path}: expected MemTotal and MemAvailable, got: {error!r}") from None
    for limit, room in cgroup_memory(root):
        total, available = min(total, limit), min(available, room)
    return total, min(available, total)

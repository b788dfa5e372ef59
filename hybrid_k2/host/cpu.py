"""What this CPU can do, as the system tells it."""

from __future__ import annotations

from pathlib import Path


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Return the names of the instruction sets that the first core has; none where the system does not tell.

    `root` holds the proc tree.
    """
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return frozenset(next(named, ()))

"""What this CPU is and can do, as the system tells it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def cpu_model(root: Path = ROOT) -> str:
    """Return the name of the CPU; nothing where the system does not tell. `root` holds the proc tree."""
    return _first(root, "model name")


def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    """Return the names of the instruction sets that the first core has; none where the system does not tell.

    `root` holds the proc tree.
    """
    return frozenset(_first(root, "flags").split())


def _first(root: Path, name: str) -> str:
    """Return what /proc/cpuinfo has under a name for the first core."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")

"""The built-in demo checkpoint: K2 Tiny, a very small model of K2.6's architecture and file format."""

from __future__ import annotations

from pathlib import Path


def demo_path() -> Path:
    """Return the folder of the demo checkpoint."""
    return Path(__file__).resolve().parent / "checkpoint"

"""The built-in demo checkpoint: K2 Tiny, a very small model of K2.6's architecture and file format."""

from __future__ import annotations

from pathlib import Path

from hybrid_k2.errors import CheckpointError

FOLDER = Path(__file__).resolve().parent / "checkpoint"


def demo_path() -> Path:
    """Return the folder of the demo checkpoint.

    Raises: CheckpointError: hybrid-k2 was installed without it.
    """
    if not (FOLDER / "config.json").is_file():
        raise CheckpointError(
            f"demo: expected the built-in model in {FOLDER}, got an installation without it",
            hint="install hybrid-k2 again, or name a checkpoint: hybrid-k2 chat PATH_OR_REPO_ID",
        )
    return FOLDER

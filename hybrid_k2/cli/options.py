"""What several commands check of their options, as usage errors."""

from __future__ import annotations

from pathlib import Path

import typer


def trace_file(name: str | None) -> Path | None:
    """Return the file that --trace names; None without one. Raises: typer.BadParameter for an empty name."""
    if name is not None and not name.strip():
        raise typer.BadParameter(f"expected the name of a file, got {name!r}", param_hint="--trace")
    return None if name is None else Path(name)

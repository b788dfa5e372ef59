"""What several commands check of their options, as usage errors."""

from __future__ import annotations

from pathlib import Path

import typer


def trace_file(name: str | None) -> Path | None:
    """Return the file that --trace names; None without one. Raises: typer.BadParameter for an empty name."""
    if name is not None and not name.strip():
        raise typer.BadParameter(f"expected the name of a file, got {name!r}", param_hint="--trace")
    return None if name is None else Path(name)


def memory_size(text: str, option: str) -> int:
    """Read a size in bytes, as `768GiB`. Raises: typer.BadParameter."""
    from hybrid_k2.placement.sizes import try_parse_bytes

    size = try_parse_bytes(text)
    if not size:
        raise typer.BadParameter(f"expected a size above 0 with its unit, as 768GiB, got {text!r}", param_hint=option)
    return size

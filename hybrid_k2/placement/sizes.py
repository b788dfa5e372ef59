"""Byte sizes as people write them: `640GiB`, `24GB`."""

from __future__ import annotations

import re
from fractions import Fraction

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {
    **{f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
}
_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([KMGT]i?B)")


def try_parse_bytes(text: str) -> int | None:
    """Read a size with its unit, rounded down to whole bytes; None when it is not one."""
    match = _SIZE.fullmatch(text)
    return int(Fraction(match[1]) * _UNITS[match[2]]) if match else None


def format_bytes(count: int) -> str:
    """Show a byte count with two decimals in the largest binary unit that it reaches."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"

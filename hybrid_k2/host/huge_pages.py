"""Whether the system gives large pages to memory that asks for them."""

from __future__ import annotations

import re
from pathlib import Path

SETTING = "sys/kernel/mm/transparent_hugepage/enabled"


def transparent_huge_pages(root: Path = Path("/")) -> str | None:
    """Return "always", "madvise" or "never"; None where the system does not say. `root` holds the sys tree."""
    try:
        chosen = re.search(r"\[(\w+)\]", (root / SETTING).read_text())
    except OSError:
        return None
    return chosen[1] if chosen else None

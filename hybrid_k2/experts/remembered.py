"""What one run finds out about this machine and the next one may use: small files under ~/.cache/hybrid-k2.

Nothing depends on such a file: one that is missing, damaged or cannot be written costs time, never results.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("hybrid_k2")


def cache_folder() -> Path:
    """Find the folder of remembered measurements: `hybrid-k2` in XDG_CACHE_HOME or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "hybrid-k2"


def recall(file: Path, key: str) -> dict[str, Any] | None:
    """Return the values that were remembered in this file for this key; None where there are none."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        return dict(found) if found["key"] == key else None  # two keys may share a file name
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def remember(file: Path, key: str, values: Mapping[str, Any]) -> None:
    """Put the file in place in one step, so that another process sees all of it or nothing; a failure is logged."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            part = Path(folder) / file.name
            part.write_text(json.dumps({"key": key, **values}), encoding="utf-8")
            os.replace(part, file)
    except OSError as error:
        log.debug("what was found out could not be remembered in %s: %s", file, error)

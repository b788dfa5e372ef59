"""The C++ extension, or why it is not there; the only module that imports `hybrid_k2._native`."""

from __future__ import annotations

from typing import Any


def _import_native() -> tuple[Any, str | None]:
    try:
        from hybrid_k2 import _native
    except ImportError as error:
        return None, str(error)
    return _native, None


native, NATIVE_ERROR = _import_native()  # the module or None; the reason of None

"""Run Kimi K2.6 on one GPU and host memory, or on the host alone.

The public surface is `Engine`, `SamplingParams`, `Reply` and the errors of `hybrid_k2.errors`. The names that need
torch are imported on first use, so that `hybrid-k2 --help` starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hybrid_k2.errors import HybridK2Error

if TYPE_CHECKING:
    from hybrid_k2.engine import Engine, Reply, SamplingParams

__version__ = "0.1.0"
__all__ = ["Engine", "HybridK2Error", "Reply", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Engine", "Reply", "SamplingParams"):
        return getattr(import_module("hybrid_k2.engine"), name)
    raise AttributeError(f"module 'hybrid_k2' has no attribute {name!r}")

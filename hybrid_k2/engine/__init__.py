"""The Python API: Engine, the sampling parameters, and what a generation gives back.

What needs torch is imported on first use: a chat with a server does without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hybrid_k2.engine.grammar import Grammar
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.reply import FinishEvent, Reply, Timings, TokenLogprob, ToolCall, TopLogprob, Usage

if TYPE_CHECKING:
    from hybrid_k2.engine.engine import Engine
    from hybrid_k2.engine.generation import Generation

__all__ = [
    "Engine",
    "FinishEvent",
    "Generation",
    "Grammar",
    "Reply",
    "SamplingParams",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "TopLogprob",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name in ("Engine", "Generation"):
        return getattr(import_module(f"hybrid_k2.engine.{name.lower()}"), name)
    raise AttributeError(f"module 'hybrid_k2.engine' has no attribute {name!r}")

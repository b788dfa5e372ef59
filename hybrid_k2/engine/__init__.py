"""The Python API: Engine, the sampling parameters, and what a generation gives back."""

from __future__ import annotations

from hybrid_k2.engine.engine import Engine
from hybrid_k2.engine.generation import Generation
from hybrid_k2.engine.grammar import Grammar
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.reply import FinishEvent, Reply, Timings, TokenLogprob, ToolCall, TopLogprob, Usage

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

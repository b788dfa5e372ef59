"""What the model reads and writes: tokenizer, prompt rendering, tool declarations, output parser."""

from __future__ import annotations

from hybrid_k2.protocol.output_parser import Event, OutputParser
from hybrid_k2.protocol.prompt import Segment, encode_prompt, render, render_segments
from hybrid_k2.protocol.tokenizer import IncrementalDecoder, Tokenizer
from hybrid_k2.protocol.tool_declaration import declare_tools

__all__ = [
    "Event",
    "IncrementalDecoder",
    "OutputParser",
    "Segment",
    "Tokenizer",
    "declare_tools",
    "encode_prompt",
    "render",
    "render_segments",
]

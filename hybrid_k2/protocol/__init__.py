"""What the model reads and writes: tokenizer, prompt rendering, tool declarations, output parser."""

from __future__ import annotations

from hybrid_k2.protocol.builtin_tools import call_type, expand_builtins
from hybrid_k2.protocol.images import (
    IMAGE_BASE,
    Image,
    ImageFormat,
    image_of_token,
    image_token,
    is_image_token,
    read_image,
)
from hybrid_k2.protocol.media_source import media_source
from hybrid_k2.protocol.output_parser import Event, OutputParser
from hybrid_k2.protocol.prompt import Segment, encode_chat, encode_prompt, render, render_segments, reply_thinks
from hybrid_k2.protocol.tokenizer import IncrementalDecoder, Tokenizer
from hybrid_k2.protocol.tool_declaration import declare_tools
from hybrid_k2.protocol.tool_ids import ToolIds, canonical_history
from hybrid_k2.protocol.videos import Clip, Video, check_video, read_video

__all__ = [
    "IMAGE_BASE",
    "Clip",
    "Event",
    "Image",
    "ImageFormat",
    "IncrementalDecoder",
    "OutputParser",
    "Segment",
    "Tokenizer",
    "ToolIds",
    "Video",
    "call_type",
    "canonical_history",
    "check_video",
    "declare_tools",
    "encode_chat",
    "encode_prompt",
    "expand_builtins",
    "image_of_token",
    "image_token",
    "is_image_token",
    "media_source",
    "read_image",
    "read_video",
    "render",
    "render_segments",
    "reply_thinks",
]

"""The special tokens that the protocol writes and reads, by the names the checkpoint gives them."""

from __future__ import annotations

# Message frame: role token, role name, IM_MIDDLE, body, IM_END.
IM_SYSTEM = "<|im_system|>"
IM_USER = "<|im_user|>"
IM_ASSISTANT = "<|im_assistant|>"
IM_MIDDLE = "<|im_middle|>"
IM_END = "<|im_end|>"
REPLY_ENDS = (IM_END, "[EOS]", "[EOT]")  # any of these ends the model's turn

# Reasoning and tool calls inside an assistant message.
THINK_BEGIN = "<think>"
THINK_END = "</think>"
SECTION_BEGIN = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"
CALL_BEGIN = "<|tool_call_begin|>"
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"

# A vocabulary without one of these cannot carry the chat format.
REQUIRED = (
    *(IM_SYSTEM, IM_USER, IM_ASSISTANT, IM_MIDDLE, IM_END, THINK_BEGIN, THINK_END),
    *(SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END),
)

# Spellings that some models type out letter by letter; they are not in the vocabulary.
SINGULAR_SECTION_BEGIN = "<|tool_call_section_begin|>"
SINGULAR_SECTION_END = "<|tool_call_section_end|>"

# Images and video.
MEDIA_BEGIN = "<|media_begin|>"
MEDIA_CONTENT = "<|media_content|>"
MEDIA_PAD = "<|media_pad|>"
MEDIA_END = "<|media_end|>"
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"  # stands for a whole video; not in the vocabulary

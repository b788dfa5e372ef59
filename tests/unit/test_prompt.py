"""Prompts equal the checkpoint's chat template, and no text that a user supplies becomes a control token."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hybrid_k2.errors import RequestError
from hybrid_k2.protocol import declare_tools, encode_prompt, render, render_segments
from tests.protocol_strategies import PLAIN_TEXT, conversations, real_tokenizer, tokenizers, tool_lists

OPTIONS = st.fixed_dictionaries(
    {}, optional={name: st.booleans() for name in ("thinking", "preserve_thinking", "add_generation_prompt")}
)
QUICK = settings(suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def template(kimi_data: Path) -> Callable[..., str]:
    """The checkpoint's template, in an environment set up like that of transformers' apply_chat_template."""

    def tojson(value: Any, ensure_ascii: bool = False, separators: tuple[str, str] | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    compiled = environment.from_string((kimi_data / "chat_template.jinja").read_text(encoding="utf-8"))
    return compiled.render


def without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Drop the null keys that the template would print as `None`."""
    kept = ("content", "name", "tool_calls")
    return {key: value for key, value in message.items() if value is not None or key in kept}


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversations(), st.none() | tool_lists(), OPTIONS)
def test_equals_the_template(
    template: Callable[..., str], messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: Any
) -> None:
    variables: dict[str, Any] = {"add_generation_prompt": True, **options}
    if tools:
        variables["tools"] = json.loads(json.dumps(tools, sort_keys=True))
        declaration = declare_tools(tools)
        if declaration.startswith("# Tools"):
            variables["tools_ts_str"] = declaration
    expected = template(messages=[without_nulls(message) for message in messages], **variables)
    assert render(messages, tools, **options) == expected


@QUICK
@given(conversations(media=False), st.none() | tool_lists(), OPTIONS, st.sampled_from(tokenizers()))
def test_look_alikes_stay_text(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: Any, tokenizer: Any
) -> None:
    segments = render_segments(messages, tools, **options)
    ids = encode_prompt(tokenizer, messages, tools, **options)
    controls = [tokenizer.special[segment.text] for segment in segments if segment.control]
    assert [token for token in ids if token in tokenizer.special_ids] == controls
    assert tokenizer.decode(ids) == render(messages, tools, **options)
    assert not any(not a.control and not b.control for a, b in itertools.pairwise(segments))


@QUICK
@given(conversations(PLAIN_TEXT, media=False), st.none() | tool_lists(PLAIN_TEXT), OPTIONS)
def test_ids_are_those_of_the_rendered_text(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: Any
) -> None:
    for tokenizer in tokenizers():
        text = render(messages, tools, **options)
        assert encode_prompt(tokenizer, messages, tools, **options) == tokenizer.encode(text, allow_special=True)


def test_ids_of_a_long_prompt_are_cut_where_the_rendered_text_is() -> None:
    long = ["word " * 90_000, "x" * 60_001, " " * 30_000 + "y" * 390_000]
    messages = [{"role": "user", "content": text, "name": "n" * 17} for text in long]
    for tokenizer in tokenizers():
        text = render(messages)
        assert encode_prompt(tokenizer, messages) == tokenizer.encode(text, allow_special=True)


SYSTEM = {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."}
QUESTION = {"role": "user", "content": "2+2?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"enum": ["c", "f"], "type": "string"},
                "city": {"type": "string", "description": "City name"},
                "days": {"type": "integer", "minimum": 1, "default": 3},
            },
            "required": ["city"],
        },
    },
}
TOOL_TURN = [
    {"role": "user", "content": "Weather in Oslo?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "need tool",
        "tool_calls": [
            {"id": "functions.get_weather:0", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": '{"t": 4}'},
]
DECLARED = (
    "<|im_system|>tool_declare<|im_middle|># Tools\n\n## functions\nnamespace functions {\n// Look up the weather.\n"
    "type get_weather = (_: {\n  // City name\n  city: string,\n  // minimum: 1\n  // Default: 3\n  days?: number,\n"
    '  unit?: "c" | "f"\n}) => any;\n}\n<|im_end|>'
)
CALLED = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
    '<|im_system|>tool<|im_middle|>## Return of functions.get_weather:0\n{"t": 4}<|im_end|>'
)
ASKED = "<|im_user|>user<|im_middle|>Weather in Oslo?<|im_end|><|im_assistant|>assistant<|im_middle|>"
OPEN = "<|im_assistant|>assistant<|im_middle|><think>"


def test_golden_thinking() -> None:
    assert render([SYSTEM, QUESTION]) == (
        "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
        "<|im_user|>user<|im_middle|>2+2?<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
    )


def test_golden_instant() -> None:
    assert render([QUESTION], thinking=False) == (
        "<|im_user|>user<|im_middle|>2+2?<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>"
    )


def test_golden_parts() -> None:
    image = {"type": "image_url", "image_url": {"url": "u"}}
    parts = [
        {"type": "text", "text": "Look: "},
        image,
        {"type": "text", "text": " ok?"},
        {"type": "text", "text": "two"},
    ]
    assert render([{"role": "user", "content": parts}], add_generation_prompt=False) == (
        "<|im_user|>user<|im_middle|>Look: <|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
        " ok?two<|im_end|>"
    )


def test_golden_tool_turn_in_progress() -> None:
    assert render(TOOL_TURN, tools=[WEATHER]) == f"{DECLARED}{ASKED}<think>need tool</think>{CALLED}{OPEN}"


def test_golden_next_turn_drops_or_keeps_reasoning() -> None:
    done = {"role": "assistant", "content": "4 degrees.", "reasoning": "done"}
    messages = [*TOOL_TURN, done, {"role": "user", "content": "And Rome?"}]
    after = f"4 degrees.<|im_end|><|im_user|>user<|im_middle|>And Rome?<|im_end|>{OPEN}"
    said = f"{CALLED}<|im_assistant|>assistant<|im_middle|>"
    assert render(messages) == f"{ASKED}<think></think>{said}<think></think>{after}"
    assert (
        render(messages, preserve_thinking=True) == f"{ASKED}<think>need tool</think>{said}<think>done</think>{after}"
    )


def test_golden_image_prompt_ids() -> None:
    tokenizer = real_tokenizer()
    if tokenizer is None:
        pytest.skip("the K2.6 vocabulary is not at hand")
    parts = [{"type": "image"}, {"type": "text", "text": "请用中文简短描述这张图片。"}]
    text = render([{"role": "user", "content": parts}], thinking=False).replace("<|media_pad|>", "<|media_pad|>" * 4)
    ids = tokenizer.encode(text, allow_special=True)
    assert len(ids) == 26
    assert [i for i, token in enumerate(ids) if token == tokenizer.special["<|media_pad|>"]] == [6, 7, 8, 9]
    digest = hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()
    assert digest == "67f80d6086475aede2f1f5426cd1f0d4805cf287c954660557dcfef3449f39d8"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "{}"),
        ({"arguments": None}, "{}"),
        ({"arguments": '{"a": tru'}, '{"a": tru'),
        ({"arguments": ""}, ""),
        ({"arguments": [1, "é"]}, '[1, "é"]'),
        ({"arguments": 7}, "7"),
        ({"arguments": {"n": 9007199254740993}}, '{"n": 9007199254740993}'),
    ],
)
def test_takes_malformed_tool_history(arguments: dict[str, Any], expected: str) -> None:
    call = {"id": "functions.f:0", "function": {"name": "f", **arguments}}
    text = render([{"role": "assistant", "tool_calls": [call]}], add_generation_prompt=False)
    assert f"<|tool_call_argument_begin|>{expected}<|tool_call_end|>" in text


@pytest.mark.parametrize("absent", [{}, {"content": None}, {"name": None}, {"name": ""}, {"tool_calls": None}])
def test_null_is_absent(absent: dict[str, Any]) -> None:
    message = {"role": "assistant", "reasoning": None, "reasoning_content": "r", **absent}
    assert render([message], add_generation_prompt=False) == render(
        [{"role": "assistant"}], add_generation_prompt=False
    )
    assert "<think>r</think>" in render([message], preserve_thinking=True)
    assert "None" not in render([{"role": "tool", "tool_call_id": None, "content": None}])


def test_an_empty_reasoning_wins_over_reasoning_content() -> None:
    message = {"role": "assistant", "reasoning": "", "reasoning_content": "r"}
    assert "<think></think>" in render([message], preserve_thinking=True)


@pytest.mark.parametrize("media", ["image", "image_url", "video", "video_url"])
def test_media_are_rendered_and_not_encoded(media: str) -> None:
    messages = [QUESTION, {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": media}]}]
    assert ("<|media_pad|>" in render(messages)) == media.startswith("image")
    assert ("<|kimi_k25_video_placeholder|>\n" in render(messages)) == media.startswith("video")
    with pytest.raises(RequestError, match=r"messages\[1\]\.content\[1\]: expected text, got (image|video)"):
        encode_prompt(tokenizers()[0], messages)


BAD_CALL = {"id": "functions.f:0", "function": {"name": "f", "arguments": {1j: 2}}}


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ("hi", r"messages\[1\]: expected an object, got str"),
        (None, r"messages\[1\]: expected an object, got nothing"),
        ({"content": "x"}, r"messages\[1\]\.role: expected text, got nothing"),
        ({"role": 1}, r"messages\[1\]\.role: expected text, got int"),
        ({"role": "user", "content": 3}, r"messages\[1\]\.content: expected text, a list of parts or null, got int"),
        ({"role": "user", "content": {"text": "x"}}, r"messages\[1\]\.content: .*got dict"),
        ({"role": "user", "content": ["x"]}, r"messages\[1\]\.content\[0\]: expected an object, got str"),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[1\]\.content\[0\]\.text: expected text"),
        ({"role": "user", "name": 5}, r"messages\[1\]\.name: expected text, got int"),
        ({"role": "assistant", "reasoning": ["x"]}, r"messages\[1\]\.reasoning: expected text, got list"),
        ({"role": "assistant", "tool_calls": "x"}, r"messages\[1\]\.tool_calls: expected a list, got str"),
        ({"role": "assistant", "tool_calls": [1]}, r"messages\[1\]\.tool_calls\[0\]: expected an object"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, r"tool_calls\[0\]\.function: expected an object"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\]\.id: expected text"),
        ({"role": "assistant", "tool_calls": [BAD_CALL]}, r"function\.arguments: expected JSON data"),
        ({"role": "tool", "tool_call_id": 3}, r"messages\[1\]\.tool_call_id: expected text, got int"),
    ],
)
def test_malformed_messages_name_their_index(message: Any, place: str) -> None:
    for call in (render, lambda messages: encode_prompt(tokenizers()[0], messages)):
        with pytest.raises(RequestError, match=place):
            call([QUESTION, message])


@pytest.mark.parametrize("messages", ["hello", {"role": "user"}, 3, None])
def test_messages_must_be_a_list(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages: expected a list"):
        render(messages)


def test_lone_surrogates_become_replacement_characters() -> None:
    messages = [{"role": "user", "content": "a\ud800b"}]
    for tokenizer in tokenizers():
        assert "a\ufffdb" in tokenizer.decode(encode_prompt(tokenizer, messages))

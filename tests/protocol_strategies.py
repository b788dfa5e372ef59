"""Tokenizers and hypothesis strategies for the tests of hybrid_k2/protocol."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hybrid_k2.protocol import Event, Tokenizer
from tests.conftest import SHARED

SPECIAL_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
    "<|im_middle|>": 17,
    "<|media_begin|>": 18,
    "<|media_content|>": 19,
    "<|media_end|>": 20,
    "<|media_pad|>": 21,
    "<think>": 22,
    "</think>": 23,
    "[UNK]": 254,
    "[PAD]": 255,
}
# Tokens that cut JSON, marker look-alikes and UTF-8 characters at awkward places.
MERGES = [
    b"th",
    b"the",
    b" the",
    b'{"',
    b'":',
    b'"}',
    b"<|",
    b"|>",
    b"\xe4\xbd",
    b"\xbd\xa0",
    b"\xf0\x9f",
    b'\\"',
    b"}}",
]


def write_vocabulary(folder: Path, tokens: list[bytes], named: dict[str, int]) -> Path:
    """Write tiktoken.model and tokenizer_config.json; `named` maps names to offsets above the ranks."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("".join(lines))
    added = {str(len(tokens) + offset): {"content": name} for name, offset in named.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return folder


@cache
def small_tokenizer() -> Tokenizer:
    """A byte-level vocabulary with a few merges and the special tokens at their K2.6 offsets."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = [bytes([byte]) for byte in range(256)] + MERGES
        return Tokenizer.load(write_vocabulary(Path(folder), tokens, SPECIAL_OFFSETS))


@cache
def real_tokenizer() -> Tokenizer | None:
    """The K2.6 vocabulary, where the data files are at hand."""
    folder = SHARED / "data" / "kimi-k2.6"
    return Tokenizer.load(folder) if folder.is_dir() else None


def tokenizers() -> list[Tokenizer]:
    real = real_tokenizer()
    return [small_tokenizer()] if real is None else [small_tokenizer(), real]


# -- text

LOOK_ALIKES = [*SPECIAL_OFFSETS, "<|reserved_token_271|>", "<|tool_call_section_begin|>", "<|im_end", "|>", "<think"]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORDS = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\n\n",
        "hello",
        " the answer",
        "你好，世界",
        "🙂",
        "e\u0301",
        "{}",
        '{"a": "b"}',
        "`x`",
        "'",
        "\r\n\t",
    ]
)
PLAIN_TEXT = (
    st.lists(WORDS | UNICODE, max_size=4).map("".join).map(lambda text: text.replace("<", "‹").replace("[", "("))
)
ANY_TEXT = st.lists(WORDS | UNICODE | st.sampled_from(LOOK_ALIKES), max_size=5).map("".join)


# -- tools

NAMES = st.sampled_from(["get_weather", "exec", "a.b-c", "search2", "名前", "add"])
_SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from([0.5, 1e20, "s", 'q"', "é"])


def _schemas(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    def described(schema: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        extra = st.fixed_dictionaries({}, optional={"description": texts, "default": _SCALARS})
        return st.tuples(schema, extra).map(lambda pair: {**pair[0], **pair[1]})

    def grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        keys = st.sampled_from(["a", "b", "city", "x y"])
        objects = st.fixed_dictionaries(
            {"type": st.just("object")},
            optional={
                "properties": st.dictionaries(keys, inner, max_size=3),
                "required": st.lists(keys, max_size=2),
                "additionalProperties": st.booleans() | inner,
            },
        )
        arrays = st.fixed_dictionaries({"type": st.just("array")}, optional={"items": inner, "minItems": st.just(1)})
        unions = st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)})
        return described(objects | arrays | unions)

    scalars = st.fixed_dictionaries(
        {"type": st.sampled_from(["string", "number", "integer", "boolean", "null", ["string", "null"], ["integer"]])},
        optional={"minimum": st.integers(0, 3), "pattern": st.just("^a$")},
    )
    enums = st.fixed_dictionaries({"enum": st.lists(_SCALARS, min_size=1, max_size=3)})
    no_typescript = st.just({"oneOf": [{"type": "string"}]})  # sends the whole list to the JSON form
    return st.recursive(described(scalars | enums) | st.booleans() | no_typescript, grow, max_leaves=6)


def tool_lists(texts: st.SearchStrategy[str] = ANY_TEXT) -> st.SearchStrategy[list[dict[str, Any]]]:
    parameters = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(NAMES, _schemas(texts), max_size=3)},
        optional={"required": st.lists(NAMES, max_size=2)},
    )
    function = st.fixed_dictionaries({"name": NAMES}, optional={"description": texts, "parameters": parameters})
    tool = st.fixed_dictionaries({"function": function, "type": st.just("function")})
    plugin = st.fixed_dictionaries({"type": st.just("_plugin"), "note": texts})
    return st.lists(tool | tool | tool | plugin, max_size=3)


# -- conversations


def conversations(
    texts: st.SearchStrategy[str] = ANY_TEXT, media: bool = True
) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Messages of every shape that the chat template gives a meaning to."""
    text_parts = st.fixed_dictionaries({"type": st.just("text"), "text": texts})
    media_parts = st.sampled_from(
        [{"type": "image_url", "image_url": {"url": "u"}}, {"type": "image"}, {"type": "video_url"}, {"type": "video"}]
    )
    parts = st.lists(text_parts | media_parts if media else text_parts, max_size=3)
    content = st.none() | texts | parts
    json_values = st.recursive(
        _SCALARS | texts,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
        max_leaves=4,
    )
    call = st.fixed_dictionaries(
        {
            "id": st.sampled_from(["functions.exec:0", "call_2", ""]) | texts,
            "function": st.fixed_dictionaries(
                {
                    "name": NAMES,
                    "arguments": texts
                    | st.dictionaries(texts, json_values, max_size=2)
                    | json_values.filter(lambda value: value is not None),
                }
            ),
        },
        optional={"type": st.just("function")},
    )
    name = {"name": st.none() | st.just("") | texts}
    plain = st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "developer", "judge"])}, optional={"content": content, **name}
    )
    assistant = st.fixed_dictionaries(
        {"role": st.just("assistant")},
        optional={
            "content": content,
            "reasoning": texts | st.none(),
            "reasoning_content": texts | st.none(),
            "tool_calls": st.none() | st.lists(call, max_size=3),
            **name,
        },
    )
    tool = st.fixed_dictionaries(
        {"role": st.just("tool")}, optional={"tool_call_id": texts, "content": content, **name}
    )
    return st.lists(plain | assistant | assistant | tool, max_size=7)


# -- replies


def joined(events: list[Event]) -> list[Event]:
    """Merge neighbours of one kind and call: what does not depend on how a reply was cut."""
    merged: list[Event] = []
    for event in events:
        if merged and (event.kind, event.index) == (merged[-1].kind, merged[-1].index):
            merged[-1] = replace(event, text=merged[-1].text + event.text)
        else:
            merged.append(event)
    return merged


def strip_markers(text: str) -> str:
    return re.sub(r"<\|[a-z0-9_]+\|>|</?think>", "", text)

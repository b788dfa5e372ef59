"""Grammars on the small vocabulary, for tests of the guide."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from hybrid_k2.engine.grammar import Grammar
from hybrid_k2.engine.guide import Guide, GuideVocabulary
from tests.protocol_strategies import small_tokenizer

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, ARGUMENT_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


@cache
def vocabulary() -> GuideVocabulary:
    return GuideVocabulary(small_tokenizer(), [small_tokenizer().special["[EOS]"]])


def guide(grammar: Grammar, thinking: bool = False) -> Guide:
    return Guide(grammar, vocabulary(), thinking)


def allowed(one: Guide) -> set[int]:
    return set(np.flatnonzero(one.allowed()).tolist())


def encoded(text: str) -> list[int]:
    return small_tokenizer().encode(text, allow_special=True)


def advanced(one: Guide, text: str) -> Guide:
    """Take a text, each token of which must be allowed."""
    for token in encoded(text):
        assert token in allowed(one), (text, small_tokenizer().token_bytes(token))
        one.advance(token)
    return one


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}

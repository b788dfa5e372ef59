"""Partial mode: the model goes on with a last message that the client began."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.errors import RequestError
from hybrid_k2.protocol import encode_prompt, render, reply_thinks
from tests.protocol_strategies import PLAIN_TEXT, conversations, tokenizers

USER = {"role": "user", "content": "Name a colour."}
ASKED = "<|im_user|>user<|im_middle|>Name a colour.<|im_end|>"


def begun(content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "partial": True, **more}


@pytest.mark.parametrize(
    ("message", "thinking", "text", "thinks"),
    [
        (begun("It is "), True, "assistant<|im_middle|><think></think>It is ", False),
        (begun("It is "), False, "assistant<|im_middle|><think></think>It is ", False),
        (begun("It is ", name="Rosa"), True, "Rosa<|im_middle|><think></think>It is ", False),
        (begun("It", reasoning_content="hm"), True, "assistant<|im_middle|><think>hm</think>It", False),
        (begun("It", reasoning_content="hm"), False, "assistant<|im_middle|><think></think>It", False),
        (begun("", reasoning_content="hm"), True, "assistant<|im_middle|><think>hm", True),
        (begun(None), True, "assistant<|im_middle|><think>", True),
        (begun([{"type": "text", "text": ""}]), True, "assistant<|im_middle|><think>", True),
        (begun(""), False, "assistant<|im_middle|><think></think>", False),
        (begun("<|im_end|>"), True, "assistant<|im_middle|><think></think><|im_end|>", False),
    ],
)
def test_the_message_is_left_open(message: Any, thinking: bool, text: str, thinks: bool) -> None:
    assert render([USER, message], thinking=thinking) == f"{ASKED}<|im_assistant|>{text}"
    assert reply_thinks([USER, message], thinking) is thinks


@given(conversations(PLAIN_TEXT, media=False), PLAIN_TEXT.filter(bool), st.booleans(), st.sampled_from(tokenizers()))
def test_the_rest_of_the_turn_closes_the_prompt_of_the_template(
    messages: list[dict[str, Any]], content: str, thinking: bool, tokenizer: Any
) -> None:
    """What a partial message begins is what a whole one with the same text has in the turn in progress."""
    prompt = render([*messages, begun(content)], thinking=thinking)
    assert prompt == render([*messages, USER], thinking=thinking, add_generation_prompt=False).removesuffix(ASKED) + (
        f"<|im_assistant|>assistant<|im_middle|><think></think>{content}"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, [*messages, begun(content)], thinking=thinking)) == prompt


def test_the_turn_in_progress_keeps_its_reasoning() -> None:
    call = {"id": "functions.a:0", "function": {"name": "a", "arguments": "{}"}}
    turn = [
        {"role": "assistant", "reasoning_content": "plan", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.a:0", "content": "4"},
    ]
    assert "<think>plan</think>" in render([USER, *turn, begun("It")])


def test_partial_counts_on_the_last_message_only() -> None:
    earlier = [USER, begun("It is "), {"role": "assistant", "content": "red."}, USER]
    closed = [{key: value for key, value in message.items() if key != "partial"} for message in earlier]
    assert render(earlier) == render(closed)
    assert reply_thinks(earlier)
    assert render([USER, begun("It", partial=False)]) == render([USER, {"role": "assistant", "content": "It"}])
    assert render([USER, begun("It")], add_generation_prompt=False).endswith("It<|im_end|>")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": "x", "partial": True}, "assistant message"),
        (begun("x", partial="yes"), "true or false"),
        (begun("x", tool_calls=[{"id": "a", "function": {}}]), "without tool calls"),
    ],
)
def test_what_cannot_be_continued_is_refused(message: Any, expected: str) -> None:
    with pytest.raises(RequestError, match=rf"messages\[1\]\.partial: expected .*{expected}"):
        render([USER, message])

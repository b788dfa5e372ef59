"""The output parser on reasoning, content, stray markers, prose about markers, white space, and its use."""

from __future__ import annotations

import pytest

from hybrid_k2.protocol import OutputParser
from tests.output_replies import (
    ARGS,
    CALL,
    END_CALL,
    END_ONE_SECTION,
    END_SECTION,
    NO_TEXT,
    ONE_SECTION,
    SECTION,
    TOOLS,
    call,
    check,
    parse_ids,
    parse_text,
)
from tests.protocol_strategies import small_tokenizer, tokenizers

# -- well-formed replies


def test_plain_answer() -> None:
    check("think</think>answer", reasoning="think", content="answer")


def test_reasoning_without_an_end_is_all_reasoning() -> None:
    check("only thoughts", reasoning="only thoughts")


def test_instant_mode_has_no_reasoning() -> None:
    check("answer", content="answer", thinking=False)


def test_one_call_with_its_id() -> None:
    reply = check(
        f"r</think>c{SECTION}{call('functions.get_weather:7', '{}')}{END_SECTION}",
        reasoning="r",
        content="c",
        calls=[("get_weather", "{}")],
    )
    assert reply.begun == [(0, "functions.get_weather:7", "get_weather")]
    assert [event.kind for event in reply.events][-3:] == ["tool_call_begin", "tool_call_arguments", "tool_call_end"]
    assert {(e.index, e.id, e.name) for e in reply.events[-3:]} == {(0, "functions.get_weather:7", "get_weather")}
    assert reply.parser.warnings == []


def test_several_calls_in_one_section_and_several_sections() -> None:
    first = call("functions.exec:0", '{"command": "ls"}') + call("functions.get_weather:1", '{"city": "Oslo"}')
    second = call("functions.a.b-c:2", '{"x": 1}')
    reply = check(
        f"r</think>{SECTION}{first}{END_SECTION}between{SECTION}{second}{END_SECTION}after",
        reasoning="r",
        content="betweenafter",
        calls=[("exec", '{"command": "ls"}'), ("get_weather", '{"city": "Oslo"}'), ("a.b-c", '{"x": 1}')],
    )
    assert [index for index, _, _ in reply.begun] == [0, 1, 2]


# -- what serving.md asks for: reasoning and stray markers


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>r</think>c", "r", "c"),
        ("<think><think>r<think>s</think>c", "rs", "c"),
        ("r</think>c</think>d", "r", "cd"),
        ("r</think>c<think>d", "r", "cd"),
        ("</think>c", "", "c"),
        (f"r{END_SECTION}s{END_CALL}t{ARGS}u</think>c", "rstu", "c"),
        (f"r</think>c{END_SECTION}d{END_CALL}e{ARGS}f", "r", "cdef"),
        (f"r{SECTION}not a call{END_SECTION} more", "r", "not a call more"),
        ("r<|im_user|>s</think>c<|media_pad|>d<|reserved_token_300|>", "rs", "cd"),
    ],
)
def test_stray_markers_neither_leak_nor_cost_text(text: str, reasoning: str, content: str) -> None:
    if "<|reserved" in text:
        text = text.replace("300", str(small_tokenizer().token_id("[BOS]") + 100))
        reply = parse_ids(small_tokenizer().encode(text, allow_special=True), small_tokenizer(), tools=TOOLS)
        assert (reply.reasoning, reply.content, reply.calls) == (reasoning, content, [])
        return
    check(text, reasoning=reasoning, content=content)


def test_a_think_marker_in_instant_mode_hides_nothing() -> None:
    check("<think>a</think>b", content="ab", thinking=False)


def test_a_section_ends_reasoning() -> None:
    check(f"r{SECTION}{call('functions.exec:0', '{}')}{END_SECTION}", reasoning="r", calls=[("exec", "{}")])


def test_a_bare_call_is_a_call_and_ends_reasoning() -> None:
    check(f"r{call('functions.exec:0', '{}')}c", reasoning="r", content="c", calls=[("exec", "{}")])
    check(f"r</think>c{call('functions.exec:0', '{}')}d", reasoning="r", content="cd", calls=[("exec", "{}")])


@pytest.mark.parametrize("name", NO_TEXT)
def test_ids_that_end_a_reply_or_fill_it_have_no_text(name: str) -> None:
    for tokenizer in tokenizers():
        ids = tokenizer.encode(
            f"r{name}</think>{name}c{name}{call('functions.exec:0', '{}')}{name}", allow_special=True
        )
        reply = parse_ids(ids, tokenizer, tools=TOOLS)
        assert (reply.reasoning, reply.content, reply.calls) == ("r", "c", [("exec", "{}")])
        cut_string = f'{CALL}functions.exec:0{ARGS}{{"command": "a{name}b'
        reply = parse_ids(tokenizer.encode(cut_string, allow_special=True), tokenizer, tools=TOOLS)
        assert reply.arguments(0) == '{"command": "ab'


def test_a_character_cut_off_by_a_marker_is_a_replacement_character() -> None:
    tokenizer = small_tokenizer()
    first, *rest = "é".encode()
    reply = parse_ids([first, tokenizer.special["</think>"], *rest, *tokenizer.encode("c")], tokenizer)
    assert (reply.reasoning, reply.content) == ("\ufffd", "\ufffdc")


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    tokenizer = small_tokenizer()
    reply = parse_ids([*tokenizer.encode("a"), tokenizer.vocab_size, -1, *tokenizer.encode("b")], tokenizer)
    assert reply.reasoning == "ab"


# -- prose about markers


def test_markers_in_ordinary_tokens_are_prose() -> None:
    text = f"Use {SECTION}{CALL}functions.exec:0{ARGS}{{}}{END_CALL}{END_SECTION} and </think>, <think> or [EOS]."
    for tokenizer in tokenizers():
        for thinking in (True, False):
            reply = parse_ids(tokenizer.encode(text), tokenizer, [1, 2], tools=TOOLS, thinking=thinking)
            assert (reply.reasoning + reply.content, reply.calls) == (text, [])
            assert (reply.content == text) != thinking


@pytest.mark.parametrize("quotes", ["``", '""', "''", "“”", "«»"])
def test_quoted_markers_in_text_are_prose(quotes: str) -> None:
    opening, closing = quotes
    quoted = f"{opening}{SECTION}{CALL}{closing}"
    text = f"r {quoted} </think>The {quoted} opens a section, {opening}{END_CALL}{closing} ends a call."
    reply = f"{text}{call('functions.exec:0', '{}')}"
    for sizes in ([len(reply)], [1], [3, 2]):
        result = parse_text(reply, sizes, tools=TOOLS)
        assert result.reasoning == f"r {quoted} "
        assert result.content == text.partition("</think>")[2]
        assert result.calls == [("exec", "{}")]


def test_quotation_marks_on_both_sides_of_a_think_marker_quote_nothing() -> None:
    check('say "hi"</think>"hi"', reasoning='say "hi"', content='"hi"')


def test_a_quotation_mark_before_a_real_section_is_no_quotation() -> None:
    text = f'r</think>He said "ls"{SECTION}{call("functions.exec:0", "{}")}{END_SECTION}"done"'
    check(text, reasoning="r", content='He said "ls""done"', calls=[("exec", "{}")])


def test_singular_section_markers() -> None:
    text = f"r</think>c{ONE_SECTION}\n{call('functions.exec:0', '{}')} {END_ONE_SECTION}d"
    check(text, reasoning="r", content="cd", calls=[("exec", "{}")])
    prose = f"The {ONE_SECTION} and {END_ONE_SECTION} markers {ONE_SECTION}"
    for tokenizer in tokenizers():
        assert parse_ids(tokenizer.encode(prose), tokenizer, [1]).reasoning == prose
    assert parse_text(prose, [1]).reasoning + parse_text(prose, [1]).content == "The  and  markers "


# -- white space


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        (" r \n</think>\n\nc \n", " r \n", "\n\nc \n"),
        ("\n</think>\n", "\n", "\n"),
        ("r\n{call}", "r\n", ""),
        ("r</think>\n\n{call}", "r", ""),
        ("r</think>\nc\n{call}\n", "r", "\nc\n"),
        ("r</think>{call} \n {call}\n", "r", ""),
        ("r</think>{call}\nd", "r", "\nd"),
        (f"r</think>c{END_CALL}\n", "r", "c"),
        (f"r</think>c{END_CALL}\n{{call}}", "r", "c"),
    ],
)
def test_white_space(text: str, reasoning: str, content: str) -> None:
    section = f"{SECTION}\n{call('functions.exec:0', '{}')}\n{END_SECTION}"
    calls = [("exec", "{}")] * text.count("{call}")
    check(text.replace("{call}", section), reasoning=reasoning, content=content, calls=calls)


# -- use


def test_ids_and_text_do_not_mix() -> None:
    parser = OutputParser(small_tokenizer())
    parser.feed([65])
    with pytest.raises(ValueError, match="either ids or text"):
        parser.feed_text("a")
    parser = OutputParser(small_tokenizer())
    parser.feed_text("a")
    with pytest.raises(ValueError, match="either ids or text"):
        parser.feed([65])


def test_nothing_follows_finish() -> None:
    parser = OutputParser(small_tokenizer())
    parser.feed([65])
    parser.finish()
    assert parser.finish() == []
    with pytest.raises(ValueError, match="after finish"):
        parser.feed([65])
    assert OutputParser(small_tokenizer()).finish() == []

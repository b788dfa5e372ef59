"""The output parser: what it makes of good, odd and hostile replies, whatever way they are cut."""

from __future__ import annotations

import json
import logging
import random
import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hybrid_k2.protocol import Event, OutputParser, Tokenizer
from hybrid_k2.protocol.json_scanner import JsonScanner
from tests.protocol_strategies import joined, small_tokenizer, strip_markers, tokenizers

SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGS, END_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
ONE_SECTION, END_ONE_SECTION = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
MARKERS = [SECTION, END_SECTION, CALL, ARGS, END_CALL, "<think>", "</think>"]
NO_TEXT = ["<|im_end|>", "[EOS]", "[EOT]", "[PAD]", "[BOS]", "[UNK]"]
SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))


def tool(name: str, *properties: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {key: {"type": "string"} for key in properties},
        "required": list(required),
    }
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    tool("get_weather", "city", "days", required=("city",)),
    tool("exec", "command", required=("command",)),
    tool("a.b-c", "x"),
    tool("step2", "n", required=("n",)),
]


class Reply:
    """What the events of one reply amount to."""

    def __init__(self, events: list[Event], parser: OutputParser) -> None:
        assert all(event.text for event in events if event.kind not in ("tool_call_begin", "tool_call_end"))
        self.events = joined(events)
        self.parser = parser
        self.reasoning = "".join(event.text for event in events if event.kind == "reasoning")
        self.content = "".join(event.text for event in events if event.kind == "content")
        self.begun = [(event.index, event.id, event.name) for event in events if event.kind == "tool_call_begin"]
        ended = {event.index for event in events if event.kind == "tool_call_end"}
        self.calls = [(name, self.arguments(index)) for index, _, name in self.begun if index in ended]

    def arguments(self, index: int | None) -> str:
        parts = (e.text for e in self.events if e.kind == "tool_call_arguments" and e.index == index)
        return "".join(parts)


def parse_ids(ids: list[int], tokenizer: Tokenizer, sizes: list[int] | None = None, **options: Any) -> Reply:
    parser = OutputParser(tokenizer, **options)
    events: list[Event] = []
    for chunk in cut(ids, sizes or [len(ids)]):
        events += parser.feed(chunk)
    return Reply(events + parser.finish(), parser)


def parse_text(text: str, sizes: list[int] | None = None, **options: Any) -> Reply:
    parser = OutputParser(small_tokenizer(), **options)
    events: list[Event] = []
    for chunk in cut(text, sizes or [len(text)]):
        events += parser.feed_text(chunk)
    return Reply(events + parser.finish(), parser)


def cut(whole: Any, sizes: list[int]) -> list[Any]:
    """Cut into chunks of the given sizes, over and over; a size of 0 feeds nothing."""
    chunks, start, turn = [], 0, 0
    while start < len(whole):
        size = sizes[turn % len(sizes)] or (0 if turn % 2 else 1)
        chunks.append(whole[start : start + size])
        start, turn = start + size, turn + 1
    return chunks


def every_way(text: str, **options: Any) -> list[Reply]:
    """Parse a reply, written with marker names, as ids and as text, at once and in small pieces."""
    replies = []
    for tokenizer in tokenizers():
        ids = tokenizer.encode(text, allow_special=True)
        replies += [parse_ids(ids, tokenizer, sizes, **options) for sizes in ([len(ids)], [1], [2, 3])]
    return replies + [parse_text(text, sizes, **options) for sizes in ([len(text)], [1], [2, 5])]


def check(text: str, *, reasoning: str = "", content: str = "", calls: Any = (), **options: Any) -> Reply:
    options = {"tools": TOOLS, **options}
    replies = every_way(text, **options)
    for reply in replies:
        assert (reply.reasoning, reply.content, reply.calls) == (reasoning, content, list(calls))
        assert reply.events == replies[0].events
    return replies[0]


def call(name: str, arguments: str) -> str:
    return f"{CALL}{name}{ARGS}{arguments}{END_CALL}"


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


# -- arguments


@pytest.mark.parametrize(
    "arguments",
    [
        '{"command": 9007199254740993}',
        '{"command":  "a\\nb" , "x":[1,2 ,3]}\n',
        '{"command": "}{][,:\\"\\\\"}',
        '{"command": "é你🙂\\u00e9"}',
        '{"command": "raw\nnewline"}',
        '{"command": 1,}',
        "{'command': 'x'}",
        "not json",
        '{"a": {"b": [{}, [], {"c": null}]}}',
        '{"command": "x"} trailing',
        "[1, 2]",
        '"text"',
    ],
)
def test_arguments_are_kept_to_the_byte(arguments: str) -> None:
    text = f"r</think>{SECTION}{call('functions.exec:0', arguments)}{call('functions.a.b-c:1', '{}')}{END_SECTION}"
    check(text, reasoning="r", calls=[("exec", arguments), ("a.b-c", "{}")])


@pytest.mark.parametrize("arguments", ["", " ", "\n\n"])
def test_empty_arguments_are_an_empty_object(arguments: str) -> None:
    check(f"{call('functions.exec:0', arguments)}", calls=[("exec", "{}")])
    check(f"{CALL}functions.exec:0{END_CALL}", calls=[("exec", "{}")])


@pytest.mark.parametrize(
    "inside",
    [
        END_CALL,
        CALL,
        SECTION + END_SECTION,
        f"{END_CALL}{END_SECTION}",
        f"{END_CALL} {END_SECTION} and then",
        f"{END_CALL}{CALL}functions.exec:1{ARGS}{{}}{END_CALL}",
        f'{CALL}functions.exec:1{ARGS}{{\\"command\\": 1}}{END_CALL}{END_SECTION}',
        "<think></think>",
        "<|im_user|>",
        f"{END_CALL}{END_CALL}{END_CALL}{END_SECTION}",
        ONE_SECTION + END_ONE_SECTION,
    ],
)
def test_markers_inside_a_json_string_are_data(inside: str) -> None:
    arguments = f'{{"command": "before {inside} after", "x": "{inside}"}}'
    text = f"r</think>{SECTION}{call('functions.exec:0', arguments)}{call('functions.a.b-c:1', '{}')}{END_SECTION}tail"
    check(text, reasoning="r", content="tail", calls=[("exec", arguments), ("a.b-c", "{}")])


@pytest.mark.parametrize(
    "broken", ['{"command": "ls', '{"command": "a\\', '{"command', '{"command": [', "{", '{"command": "a"b']
)
@pytest.mark.parametrize("gap", ["", "\n"])
def test_a_malformed_call_does_not_swallow_the_next(broken: str, gap: str) -> None:
    good = call("functions.get_weather:1", '{"city": "Oslo"}')
    text = f"{SECTION}{call('functions.exec:0', broken)}{gap}{good}{END_SECTION}tail"
    check(text, content="tail", calls=[("exec", broken), ("get_weather", '{"city": "Oslo"}')])


def test_a_malformed_last_call_does_not_swallow_the_rest() -> None:
    text = f"{SECTION}{call('functions.exec:0', chr(123) + chr(34))}{END_SECTION}tail"
    check(text, content="tail", calls=[("exec", '{"')])


def test_many_malformed_calls() -> None:
    text = SECTION + "".join(call(f"functions.exec:{n}", '{"command": "ls') for n in range(30)) + END_SECTION
    check(text, calls=[("exec", '{"command": "ls')] * 30)


@pytest.mark.parametrize("next_marker", [CALL + "functions.a.b-c:1" + ARGS + "{}" + END_CALL, END_SECTION, SECTION])
def test_a_whole_call_without_an_end_is_complete_when_something_follows(next_marker: str) -> None:
    text = f'{SECTION}{CALL}functions.exec:0{ARGS}{{"command": "ls"}}{next_marker}'
    calls = [("exec", '{"command": "ls"}')] + ([("a.b-c", "{}")] if CALL in next_marker else [])
    check(text, calls=calls)


@pytest.mark.parametrize("part", ['{"command": ', '{"command": "ls', ""])
def test_a_partial_call_without_an_end_is_cut_short(part: str) -> None:
    text = f"{SECTION}{CALL}functions.exec:0{ARGS}{part}{call('functions.a.b-c:1', '{}')}{END_SECTION}tail"
    reply = check(text, content="tail", calls=[("a.b-c", "{}")])
    assert reply.parser.incomplete_calls == (0,)
    assert reply.arguments(0) == part
    assert [index for index, _, _ in reply.begun] == [0, 1]


def test_a_call_whole_at_the_end_of_the_turn_is_complete_and_at_a_cut_it_is_not() -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(f'{CALL}functions.exec:0{ARGS}{{"command": "ls"}}', allow_special=True)
    assert parse_ids(ids, tokenizer, tools=TOOLS).calls == []
    assert parse_ids([*ids, tokenizer.special["<|im_end|>"]], tokenizer, tools=TOOLS).calls == [
        ("exec", '{"command": "ls"}')
    ]


def test_arguments_stream_before_the_call_ends() -> None:
    tokenizer = small_tokenizer()
    parser = OutputParser(tokenizer, TOOLS)
    parser.feed(tokenizer.encode(f"{SECTION}{CALL}functions.exec:0", allow_special=True))
    [begin] = parser.feed(tokenizer.encode(ARGS, allow_special=True))
    assert (begin.kind, begin.name) == ("tool_call_begin", "exec")
    texts = [event.text for piece in ('{"comm', 'and": "', "ls -l") for event in parser.feed(tokenizer.encode(piece))]
    assert texts == ['{"comm', 'and": "', "ls -l"]


def test_a_marker_in_a_string_that_prose_follows_is_data_at_once() -> None:
    tokenizer = small_tokenizer()
    parser = OutputParser(tokenizer, TOOLS)
    parser.feed(tokenizer.encode(f'{SECTION}{CALL}functions.exec:0{ARGS}{{"command": "use', allow_special=True))
    assert parser.feed(tokenizer.encode(f"{END_CALL} ", allow_special=True)) == []
    assert "".join(event.text for event in parser.feed(tokenizer.encode("to"))) == f"{END_CALL} to"
    arguments = f'{{"command": "use {END_CALL} to "end" a call"}}'
    check(call("functions.exec:0", arguments), calls=[("exec", arguments)])


@pytest.mark.parametrize(
    "inside", [f"{END_CALL}<think> b", f"{END_CALL}{END_CALL} b", f"{CALL} b", f"{CALL}</think>{ARGS}"]
)
def test_a_marker_that_no_structure_follows_is_data_even_in_bad_json(inside: str) -> None:
    arguments = f'{{"command": "a {inside} "quoted" c"}}'
    check(call("functions.exec:0", arguments), calls=[("exec", arguments)])


def test_a_malformed_call_holds_the_next_back_no_longer_than_it_must() -> None:
    tokenizer = small_tokenizer()

    def kinds(text: str) -> list[str]:
        parser = OutputParser(tokenizer, TOOLS)
        return [event.kind for event in joined(parser.feed(tokenizer.encode(text, allow_special=True)))]

    call_kinds = ["tool_call_begin", "tool_call_arguments", "tool_call_end"]
    broken = call("functions.exec:0", '{"command": "ls')
    assert kinds(f'{broken}{CALL}functions.exec:1{ARGS}{{"') == call_kinds[:2]
    assert kinds(f'{broken}{CALL}functions.exec:1{ARGS}{{"c') == [*call_kinds, "tool_call_begin", "tool_call_arguments"]
    outside = call("functions.exec:1", '{", ')  # read as one text with `broken`, its end stands outside any string
    assert kinds(broken + outside) == [*call_kinds, "tool_call_begin", "tool_call_arguments"]


@pytest.mark.parametrize("gap", ["", " \n"])
def test_an_end_marker_that_ends_the_reply_ends_the_call(gap: str) -> None:
    check(
        f"r</think>{call('functions.exec:0', chr(123) + chr(34) + 'command')}{gap}",
        reasoning="r",
        calls=[("exec", '{"command')],
    )


# -- truncation


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (f'{SECTION}{CALL}functions.exec:0{ARGS}{{"command": "l', '{"command": "l'),
        (
            f'{SECTION}{CALL}functions.exec:0{ARGS}{{"command": "use {END_CALL} to fin',
            f'{{"command": "use {END_CALL} to fin',
        ),
        (f"{SECTION}{CALL}functions.exec:0{ARGS}", ""),
        (f"{SECTION}{CALL}functions.exec:0", ""),
        (f"{SECTION}{CALL}functions.exe", ""),
    ],
)
def test_a_truncated_call_is_not_complete(text: str, arguments: str) -> None:
    reply = check("r</think>c" + text, reasoning="r", content="c")
    assert reply.arguments(0) == arguments
    assert reply.parser.incomplete_calls == (0,)
    assert reply.begun[0][2] in ("exec", "exe")
    assert any("cut short" in warning for warning in reply.parser.warnings)


def test_every_truncation_keeps_the_calls_before_it() -> None:
    first, second = '{"command": "a"}', '{"city": "b \\" c"}'
    text = f"r</think>c{SECTION}{call('functions.exec:0', first)}{call('functions.get_weather:1', second)}{END_SECTION}"
    for tokenizer in tokenizers():
        ids = tokenizer.encode(text, allow_special=True)
        whole = parse_ids(ids, tokenizer, tools=TOOLS)
        for length in range(len(ids)):
            reply = parse_ids(ids[:length], tokenizer, [1], tools=TOOLS)
            ends = sum(token == tokenizer.special[END_CALL] for token in ids[:length])
            assert reply.calls == whole.calls[:ends]
            assert whole.reasoning.startswith(reply.reasoning)
            assert whole.content.startswith(reply.content)
            assert len(reply.parser.incomplete_calls) == len(reply.begun) - ends


# -- ids of calls


@pytest.mark.parametrize(
    ("call_id", "name"),
    [
        ("functions.get_weather:0", "get_weather"),
        ("get_weather:0", "get_weather"),
        ("get_weather", "get_weather"),
        ("functions.get_weather", "get_weather"),
        ("functions_get_weather_1", "get_weather"),
        ("functionsexec5", "exec"),
        ("functions.exec.5", "exec"),
        ("exec_12", "exec"),
        ("functions.a.b-c:3", "a.b-c"),
        ("functions_a.b-c_3", "a.b-c"),
        ("functionsstep2", "step2"),
        ("functionsstep23", "step2"),
        ("step2:1", "step2"),
        ("\nfunctions.exec:0\n", "exec"),
        ("functions.get_\nweather:0", "get_weather"),
    ],
)
def test_forms_of_ids_resolve_to_declared_names(call_id: str, name: str) -> None:
    text = f"r</think>{SECTION}{call(call_id, '{}')}{END_SECTION}"
    reply = check(text, reasoning="r", calls=[(name, "{}")])
    assert reply.begun == [(0, call_id.strip(), name)]


@pytest.mark.parametrize("call_id", ["call_2", "call1234", "3", "functions.3", "functions.call_1:2", ":0", ""])
def test_a_bare_counter_resolves_by_its_arguments(call_id: str) -> None:
    text = f"{SECTION}{call(call_id, chr(123) + chr(34) + 'command' + chr(34) + ': 1}')}{END_SECTION}"
    reply = check(text, calls=[("exec", '{"command": 1}')])
    assert reply.begun == [(0, call_id or "functions.exec:0", "exec")]


@pytest.mark.parametrize(
    ("call_id", "arguments"),
    [
        ("functions.unknown:0", '{"q": 1}'),
        ("call_2", '{"unknown": 1}'),
        ("call_2", '{"city": tru'),
        ("call_2", "[1]"),
        ("call_2", "[" * 5000 + "]" * 5000),
        ("3", ""),
        ("??", '{"city": "Oslo"}'),
    ],
)
def test_an_unresolved_call_is_kept_as_text(call_id: str, arguments: str, caplog: pytest.LogCaptureFixture) -> None:
    good = call("functions.exec:1", "{}")
    with caplog.at_level(logging.WARNING, "hybrid_k2"):
        text = f"r</think>c{SECTION}{call(call_id, arguments)}{good}{END_SECTION}d"
        reply = check(text, reasoning="r", content=f"c{call_id}{arguments}d", calls=[("exec", "{}")])
    assert len(reply.parser.warnings) == 1
    assert "kept as text" in reply.parser.warnings[0]
    assert reply.parser.warnings[0] in caplog.text


def test_arguments_that_fit_two_tools_name_none() -> None:
    tools = [tool("a", "q"), tool("b", "q")]
    check(call("call_1", '{"q": 1}'), reasoning='call_1{"q": 1}', tools=tools)
    tools = [tool("a", "q"), tool("b", "q", "z", required=("z",))]
    check(call("call_1", '{"q": 1}'), calls=[("a", '{"q": 1}')], tools=tools)


def test_an_unresolved_bare_call_stays_where_it_is() -> None:
    long = "The token that opens a call, then more prose. " * 10
    check(f"r {CALL}{long}</think>c", reasoning=f"r {long}", content="c")
    check(f"r {CALL} opens a call.", reasoning="r  opens a call.")


def test_without_declared_tools_names_are_taken_as_they_come() -> None:
    text = SECTION + call("functions.a.b-c:0", "{}") + call("x/y:1", "{}") + call("functions.z", "{}") + END_SECTION
    check(text, calls=[("a.b-c", "{}"), ("x/y", "{}"), ("z", "{}")], tools=None)
    check(text, calls=[("a.b-c", "{}"), ("x/y", "{}"), ("z", "{}")], tools=[])
    check(SECTION + call("call_2", "{}"), content="call_2{}", tools=None)


def test_a_missing_argument_marker_is_made_up_for() -> None:
    text = f'{SECTION}{CALL}functions.exec:0{{"command": "{END_CALL}"}}{END_CALL}{END_SECTION}'
    check(text, calls=[("exec", f'{{"command": "{END_CALL}"}}')])


def test_an_abandoned_id() -> None:
    good = call("functions.exec:1", "{}")
    reply = check(f"{SECTION}{CALL}functions.a.b-c:0{good}{END_SECTION}", calls=[("exec", "{}")])
    assert reply.parser.incomplete_calls == (0,)
    check(f"{SECTION}{CALL}{good}{CALL}", calls=[("exec", "{}")])


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


# -- properties


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    return next(token for token in range(256) if tokenizer.token_bytes(token) == bytes([byte]))


WORDS = ["a", " ", "\n", "word", "你好", "🙂", "functions.exec:0", "call_2", "functions", ":1", "exec", "a b", "x", "1"]
SIGNS = [
    '{"command": "',
    '"}',
    "{}",
    '"',
    "\\",
    '\\"',
    ",",
    '{"',
    ":",
    "}",
    "{",
    "[",
    "]",
    '{"city": "Oslo"}',
    "'",
    "`",
]
UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<["), max_size=3)
TEXTS = st.sampled_from(WORDS) | st.sampled_from(SIGNS) | UNICODE
WHOLE = st.sampled_from(
    [
        SECTION + CALL + "functions.exec:0" + ARGS,
        CALL + "functions.get_weather:1" + ARGS + '{"city": "',
        '"}' + END_CALL + END_SECTION,
        END_CALL + "\n" + CALL,
        call("functions.exec:0", '{"command": "ls"}'),
        call("call_2", '{"n": 1}'),
        f'{{"command": "{END_CALL}{END_SECTION}"}}',
    ]
)
MARKED = st.lists(TEXTS | TEXTS | st.sampled_from(MARKERS) | WHOLE, max_size=14).map("".join)
OPTIONS = st.fixed_dictionaries({"tools": st.sampled_from([TOOLS, None]), "thinking": st.booleans()})
SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=6)


@st.composite
def replies(draw: st.DrawFn) -> tuple[Tokenizer, list[int]]:
    """Ids of an adversarial reply: markers, look-alikes, JSON, stray special ids, characters cut in two."""
    tokenizer = draw(st.sampled_from(tokenizers()))
    special = st.sampled_from(MARKERS + NO_TEXT + ["<|im_user|>"]).map(lambda name: [tokenizer.special[name]])
    any_special = st.sampled_from(sorted(tokenizer.special_ids)).map(lambda token: [token])
    odd = st.integers(128, 255).map(lambda byte: [byte_id(tokenizer, byte)])
    marked = MARKED.map(lambda text: tokenizer.encode(text, allow_special=True))
    look_alike = st.sampled_from([*MARKERS, ONE_SECTION, END_ONE_SECTION, "<|tool", "|>"]).map(tokenizer.encode)
    unknown = st.just([tokenizer.vocab_size + 3])
    pieces = draw(st.lists(marked | special | marked | look_alike | odd | any_special | unknown, max_size=10))
    return tokenizer, [token for piece in pieces for token in piece]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(replies(), SIZES, OPTIONS)
def test_events_do_not_depend_on_how_ids_are_cut(
    reply: tuple[Tokenizer, list[int]], sizes: list[int], options: Any
) -> None:
    tokenizer, ids = reply
    whole = parse_ids(ids, tokenizer, **options)
    pieces = parse_ids(ids, tokenizer, sizes, **options)
    assert pieces.events == whole.events
    assert pieces.parser.incomplete_calls == whole.parser.incomplete_calls
    assert pieces.parser.warnings == whole.parser.warnings
    check_shape(whole)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        MARKED
        | st.sampled_from(
            [ONE_SECTION, END_ONE_SECTION, "<|im_end|>", "<|x|>", "<", "<|tool", "</th", "`<|im_user|>`"]
        ),
        max_size=8,
    ).map("".join),
    SIZES,
    OPTIONS,
)
def test_events_do_not_depend_on_how_text_is_cut(text: str, sizes: list[int], options: Any) -> None:
    whole = parse_text(text, **options)
    assert parse_text(text, sizes, **options).events == whole.events
    check_shape(whole)


def check_shape(reply: Reply) -> None:
    """Calls begin once, in order, stay in one piece, and end or are reported incomplete."""
    kinds: dict[int, list[str]] = {}
    for event in reply.events:
        if event.index is None:
            assert event.kind in ("reasoning", "content")
            assert event.text
            assert event.id is None
        else:
            kinds.setdefault(event.index, []).append(event.kind)
    assert list(kinds) == list(range(len(kinds)))
    for index, of_call in kinds.items():
        middle = ["tool_call_arguments"] if "tool_call_arguments" in of_call else []
        ended = ["tool_call_end"] if index not in reply.parser.incomplete_calls else []
        assert of_call == ["tool_call_begin", *middle, *ended]
        assert middle or not ended
    content_before = [event.kind for event in reply.events if event.kind != "reasoning"]
    tail = [event.kind for event in reply.events[len(reply.events) - len(content_before) :]]
    assert tail == content_before, "reasoning comes first"


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(tokenizers()), MARKED, OPTIONS)
def test_no_text_is_lost_and_no_marker_leaks(tokenizer: Tokenizer, text: str, options: Any) -> None:
    reply = parse_ids(tokenizer.encode(text, allow_special=True), tokenizer, **options)
    assert strip_markers(reply.content + reply.reasoning) == reply.content + reply.reasoning
    rest = "".join(strip_markers(text).split())
    for event in reply.events:
        said = (event.id or "") if event.kind == "tool_call_begin" else event.text
        compact = "".join(strip_markers(said).split())
        if rest.startswith(compact):
            rest = rest.removeprefix(compact)
        else:
            made_up = compact == "{}" or re.fullmatch(r"functions\..+:\d+", compact)
            assert made_up, f"{compact!r} is not what comes next in {rest!r}"
    assert rest == ""


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(MARKED, SIZES, OPTIONS)
def test_text_and_ids_agree(text: str, sizes: list[int], options: Any) -> None:
    assume(not re.search(r"""(["'`])(<\|[a-z_]+\|>)+\1""", text))
    tokenizer = small_tokenizer()
    from_ids = parse_ids(tokenizer.encode(text, allow_special=True), tokenizer, **options)
    assert parse_text(text, sizes, **options).events == from_ids.events


JSON_STRINGS = st.lists(TEXTS | st.sampled_from([*MARKERS, "<|im_user|>"]), max_size=4).map("".join)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | JSON_STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_STRINGS, inner, max_size=3),
    max_leaves=6,
)
PROSE = st.lists(TEXTS, max_size=4).map("".join).map(str.strip)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    PROSE,
    PROSE,
    st.lists(st.dictionaries(JSON_STRINGS, JSON_VALUES, max_size=3), min_size=1, max_size=4),
    PROSE,
    SIZES,
    st.booleans(),
)
def test_well_formed_replies_come_out_as_they_went_in(
    reasoning: str, content: str, values: list[Any], after: str, sizes: list[int], ascii_only: bool
) -> None:
    arguments = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    calls = "".join(call(f"functions.exec:{n}", text) for n, text in enumerate(arguments))
    text = f"{reasoning}</think>{content}{SECTION}{calls}{END_SECTION}{after}"
    for tokenizer in tokenizers():
        reply = parse_ids(tokenizer.encode(text, allow_special=True), tokenizer, sizes, tools=TOOLS)
        assert (reply.reasoning, reply.content) == (reasoning, content + after)
        assert reply.calls == [("exec", text) for text in arguments]
        assert [json.loads(text) for _, text in reply.calls] == values


# -- cost


@pytest.mark.parametrize(
    "body",
    [
        '{"command": "' + "x" * 1_000_000 + '"}',
        '{"command": "' + '\\"' * 500_000 + '"}',
        "[" * 100_000 + "]" * 100_000,
        '{"command": "' + f"{END_CALL}{CALL}" * 20_000 + '"}',
    ],
    ids=["string", "escapes", "brackets", "markers"],
)
def test_a_megabyte_of_arguments(body: str) -> None:
    tokenizer = small_tokenizer()
    text = SECTION + call("functions.exec:0", body) + END_SECTION
    ids = tokenizer.encode(text, allow_special=True)
    started = time.process_time()
    assert parse_ids(ids, tokenizer, [16], tools=TOOLS).calls == [("exec", body)]
    assert parse_text(text, [16], tools=TOOLS).calls == [("exec", body)]
    assert time.process_time() - started < 30  # linear: 1 to 2 s; quadratic: hours


HOSTILE = [
    call("functions.exec:0", '{"'),
    call("functions.exec:0", '{"command": "'),
    call("functions.exec:0", '{ " , ":":"'),
    call("functions.exec:0", '","a":"'),
    f"{CALL}functions.exec:0{ARGS}" + '{"command": "',
    f"{END_CALL}{END_SECTION}",
    CALL,
    f"{CALL}x{ARGS}",
    "\\",
    ' , "',
]


@pytest.mark.parametrize("seed", range(8))
def test_work_is_linear_in_hostile_replies(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = 0
    scan = JsonScanner.scan

    def counting_scan(self: JsonScanner, text: str) -> None:
        nonlocal scanned
        scanned += len(text)
        scan(self, text)

    monkeypatch.setattr(JsonScanner, "scan", counting_scan)
    rng = random.Random(seed)
    motif = [rng.choice(HOSTILE) for _ in range(rng.randrange(1, 6))]
    text = SECTION + call("functions.exec:0", '{"command": "')[: -len(END_CALL)] + "".join(motif) * 150
    reply = parse_text(text, [50], tools=TOOLS)
    assert scanned <= 3 * len(text)
    assert len(reply.events) <= 10 * text.count("<") + 10


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

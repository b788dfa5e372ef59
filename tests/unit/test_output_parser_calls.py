"""The output parser on tool calls: arguments, truncation, ids."""

from __future__ import annotations

import logging

import pytest

from hybrid_k2.protocol import OutputParser
from tests.output_replies import (
    ARGS,
    CALL,
    END_CALL,
    END_ONE_SECTION,
    END_SECTION,
    ONE_SECTION,
    SECTION,
    TOOLS,
    call,
    check,
    parse_ids,
    tool,
)
from tests.protocol_strategies import joined, small_tokenizer, tokenizers

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

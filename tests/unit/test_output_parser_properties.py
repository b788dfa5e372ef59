"""What holds for every reply that the output parser meets, however it is cut, and what it costs."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hybrid_k2.protocol import Tokenizer
from hybrid_k2.protocol.json_scanner import JsonScanner
from tests.output_replies import (
    ARGS,
    CALL,
    END_CALL,
    END_ONE_SECTION,
    END_SECTION,
    MARKERS,
    NO_TEXT,
    ONE_SECTION,
    SECTION,
    TOOLS,
    Reply,
    call,
    parse_ids,
    parse_text,
)
from tests.protocol_strategies import small_tokenizer, strip_markers, tokenizers

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
    # Arguments that the parser made up may look like the text behind them: both readings are followed.
    rests = {"".join(strip_markers(text).split())}
    for event in reply.events:
        said = (event.id or "") if event.kind == "tool_call_begin" else event.text
        compact = "".join(strip_markers(said).split())
        made_up = compact == "{}" or re.fullmatch(r"functions\..+:\d+", compact)
        left = {rest.removeprefix(compact) for rest in rests if rest.startswith(compact)} | (
            rests if made_up else set()
        )
        assert left, f"{compact!r} is not what comes next in {rests}"
        rests = left
    assert "" in rests


@given(st.sampled_from(tokenizers()))
def test_made_up_arguments_are_not_taken_for_the_text_behind_them(tokenizer: Tokenizer) -> None:
    text = SECTION + call("functions.exec:0", "") + "{}a"
    reply = parse_ids(tokenizer.encode(text, allow_special=True), tokenizer, tools=TOOLS, thinking=False)
    assert [event.text for event in reply.events if event.kind == "tool_call_arguments"] == ["{}"]
    assert reply.content == "{}a"


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

"""The JSON scanner knows strings from structure, in every cut, and never calls good JSON broken."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_k2.protocol.json_scanner import JsonScanner, JsonState

OPEN, STRING, COMPLETE, BROKEN = JsonState.OPEN, JsonState.STRING, JsonState.COMPLETE, JsonState.BROKEN
STRINGS = st.text(st.sampled_from('ab"\\{}[],:\n é'), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=8,
)
CONTAINERS = st.lists(VALUES, max_size=3) | st.dictionaries(STRINGS, VALUES, max_size=3)
QUICK = settings(suppress_health_check=list(HealthCheck))


def state_after(*pieces: str) -> JsonState:
    scanner = JsonScanner()
    for piece in pieces:
        scanner.scan(piece)
    return scanner.state


@QUICK
@given(CONTAINERS, st.sampled_from([None, 1]), st.booleans(), st.sampled_from(["", " junk", '"', "}"]))
def test_good_json_is_complete_at_its_end_and_not_before(
    value: object, indent: int, ascii_only: bool, tail: str
) -> None:
    text = " \n" + json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert state_after(text + tail) is COMPLETE
    assert state_after(*text, *tail) is COMPLETE
    scanner = JsonScanner()
    for character in text:
        assert scanner.state in (OPEN, STRING)
        scanner.scan(character)


@QUICK
@given(CONTAINERS, st.data())
def test_what_is_broken_is_no_json(value: object, data: st.DataObject) -> None:
    text = json.dumps(value)
    place = data.draw(st.integers(0, len(text)))
    text = text[:place] + data.draw(st.sampled_from(["", ",", '"', "}", "]", ":", "\\", "x", " "])) + text[place + 1 :]
    state = state_after(text)
    assert state is state_after(*text)
    if state is BROKEN:
        with pytest.raises(json.JSONDecodeError):
            json.loads(text)


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("", OPEN),
        (" \n", OPEN),
        ('{"a', STRING),
        ('{"a\\', STRING),
        ('{"a\\"', STRING),
        ('{"a\\\\"', OPEN),
        ('{"a": "}', STRING),
        ('{"a": [1, 2', OPEN),
        ('"a"', BROKEN),
        ("1", BROKEN),
        ("}", BROKEN),
        ("{,", BROKEN),
        ("{1", BROKEN),
        ("{]", BROKEN),
        ("[}", BROKEN),
        ('{"a"}', BROKEN),
        ('{"a",', BROKEN),
        ('{"a" "b"', BROKEN),
        ('{"a":}', BROKEN),
        ('{"a": 1,}', BROKEN),
        ('{"a": "b"c', BROKEN),
        ("[1,]", BROKEN),
        ("[1 2", BROKEN),
        ('[1"', BROKEN),
        ("['", BROKEN),
        ("[1]]", COMPLETE),
    ],
)
def test_states(text: str, state: JsonState) -> None:
    assert state_after(text) is state
    assert state_after(*text) is state

"""Stop strings: the same cut for every way of splitting the text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_k2.engine.stop import StopMatcher

# Two letters and short strings, so that overlaps and false starts are the rule.
TEXT = st.text(alphabet="abé", max_size=40)
STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=6), max_size=4)


def cut_by_definition(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Look at every prefix in turn; at the first that ends in a stop string, the longest such one is cut off."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=400)
@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=8))
def test_every_chunking_gives_the_cut_of_the_definition(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, shown, fed = StopMatcher(stops), "", 0
    bounds = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    longest = max(map(len, stops), default=1)
    for bound in bounds:
        shown += matcher.feed(text[fed:bound])
        fed = bound
        if matcher.matched is None:
            assert text.startswith(shown)
            assert fed - len(shown) < longest  # what is held back is bounded
    shown += matcher.flush()
    assert (shown, matcher.matched) == cut_by_definition(text, stops)


@settings(max_examples=200)
@given(text=TEXT, stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    if cut_by_definition(text, stops)[1] is not None:
        return
    shown = StopMatcher(stops).feed(text)
    may_grow = [n for n in range(len(text) + 1) if n and any(stop.startswith(text[-n:]) for stop in stops)]
    assert len(text) - len(shown) == max(may_grow, default=0)


def test_nothing_passes_after_a_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("one EN") == "one "
    assert matcher.feed("D two") == ""
    assert matcher.matched == "END"
    assert matcher.feed("three") == ""
    assert matcher.flush() == ""


def test_flush_forgets_a_false_start() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.feed("xa") == "x"
    assert matcher.flush() == "a"
    assert matcher.feed("b") == "b"
    assert matcher.matched is None


@pytest.mark.parametrize("split", range(1, 6))
def test_of_two_at_one_place_the_longer_is_cut(split: int) -> None:
    text = "xabcde"
    matcher = StopMatcher(["cd", "abcd"])
    assert matcher.feed(text[:split]) + matcher.feed(text[split:]) == "x"
    assert matcher.matched == "abcd"


@given(text=TEXT, stops=STOPS, cut=st.integers(0, 40))
def test_a_stop_string_that_is_included_ends_the_text(text: str, stops: list[str], cut: int) -> None:
    without, matched = cut_by_definition(text, stops)
    matcher = StopMatcher(stops, include=True)
    shown = matcher.feed(text[:cut]) + matcher.feed(text[cut:]) + matcher.flush()
    assert (shown, matcher.matched) == (without + (matched or ""), matched)

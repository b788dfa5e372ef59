"""Spans within a line: the same for every chunking, and no text is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.cli.chat.inline import LONGEST_SPAN, InlineParser, Span, parse_line

# Text that is dense in markers, with runs long enough to pass the longest span.
LINES = st.lists(st.sampled_from([*"*_~`[]()\\ ab ", "**", "word ", "x" * 50, "漢"]), max_size=30).map("".join)


def spans_of(pieces: list[str]) -> list[Span]:
    parser = InlineParser()
    spans = [span for piece in pieces for span in parser.feed(piece)] + parser.finish()
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].style == span.style:
            joined[-1] = Span(joined[-1].text + span.text, span.style)
        else:
            joined.append(span)
    return joined


@given(LINES, st.data())
def test_every_chunking_gives_the_same_spans(line: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(line)), max_size=8)))
    pieces = [line[a:b] for a, b in zip([0, *cuts], [*cuts, len(line)], strict=True)]
    assert spans_of(pieces) == spans_of(list(line)) == parse_line(line)


@given(LINES)
def test_letters_are_neither_lost_nor_doubled(line: str) -> None:
    shown = "".join(span.text for span in parse_line(line))
    assert [c for c in shown if c.isalnum()] == [c for c in line if c.isalnum()]
    assert len(shown) <= len(line) + line.count("[")  # a link gains the blank before its address


@pytest.mark.parametrize(
    ("line", "spans"),
    [
        ("a **bold** b", [("a ", ""), ("bold", "bold"), (" b", "")]),
        ("5 * 3 * 2 = 30", [("5 * 3 * 2 = 30", "")]),
        ("snake_case_name, _it_", [("snake_case_name, ", ""), ("it", "italic")]),
        ("`a*b*` ``c`d``", [("a*b*", "code"), (" ", ""), ("c`d", "code")]),
        ("[K2](https://k2.example)!", [("K2", "link"), (" (https://k2.example)!", "")]),
        ("[1, 2] and (3)", [("[1, 2] and (3)", "")]),
        ("***both*** ~~gone~~", [("both", "bold italic"), (" ", ""), ("gone", "strike")]),
        (r"\*no\* \(x\) \[y\]", [(r"*no* \(x\) \[y\]", "")]),
        ("**never closed", [("**never closed", "")]),
        ("**a `b` c**", [("a ", "bold"), ("b", "code"), (" c", "bold")]),
    ],
)
def test_spans(line: str, spans: list[tuple[str, str]]) -> None:
    assert parse_line(line) == [Span(*span) for span in spans]


def test_text_flows_although_a_span_may_be_open() -> None:
    parser = InlineParser()
    assert parser.feed("plain *") == [Span("plain ")]
    assert parser.feed("word") == []
    assert "".join(span.text for span in parser.feed(" word" * LONGEST_SPAN)).startswith("*word word")

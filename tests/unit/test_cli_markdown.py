"""Blocks of streaming Markdown: the same for every chunking, complete, and as early as can be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.cli.chat.inline import Span
from hybrid_k2.cli.chat.markdown import CodeLine, End, MarkdownStream, Piece, Rule, Start, Table

FRAGMENTS = [
    "\n", "\n\n", "# ", "- ", "* ", "  - ", "1. ", "12) ", "> ", "```", "```python\n", "~~~", "| a | b |\n",
    "|---|---|\n", "---", "***", "word ", "**bold** ", "`code` ", "*", "_", " ", "x", "\t", "5", "漢字", "é",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


def pieces_of(chunks: list[str]) -> list[Piece]:
    stream = MarkdownStream()
    pieces = [piece for chunk in chunks for piece in stream.feed(chunk)] + stream.finish()
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, Span) and isinstance(last, Span) and piece.style == last.style:
            joined[-1] = Span(last.text + piece.text, piece.style)
        else:
            joined.append(piece)
    return joined


def visible(pieces: list[Piece]) -> str:
    text = ""
    for piece in pieces:
        match piece:
            case Start(mark, _):
                text += mark
            case Span(span, _):
                text += span
            case CodeLine(line):
                text += line + "\n"
            case Table(lines):
                text += "".join(line + "\n" for line in lines)
            case End() | Rule():
                text += "\n"
    return text


@given(TEXTS, st.data())
def test_every_chunking_gives_the_same_pieces(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=10)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert pieces_of(chunks) == pieces_of(list(text)) == pieces_of([text])


@given(TEXTS)
def test_letters_and_lines_are_neither_lost_nor_doubled(text: str) -> None:
    shown = visible(pieces_of([text]))
    assert [c for c in shown if c.isalnum()] == [c for c in text if c.isalnum()]
    assert shown.count("\n") == text.count("\n") + (not text.endswith("\n") and text != "")


@given(TEXTS)
def test_every_line_that_starts_ends(text: str) -> None:
    pieces = pieces_of([text])
    assert sum(isinstance(p, Start) for p in pieces) == sum(isinstance(p, End) for p in pieces)


def test_blocks() -> None:
    text = "# Title\n- one\n  2. two\n> said\n---\n```py\nx = '`'\n\n```\n| a | b |\n|---|---|\nend"
    assert pieces_of([text]) == [
        Start(), Span("Title", "heading"), End(),
        Start("• ", "  "), Span("one"), End(),
        Start("  2. ", "     "), Span("two"), End(),
        Start("│ ", "│ "), Span("said"), End(),
        Rule(),
        CodeLine("```py", "py", "", fence=True),
        CodeLine("x = '`'", "py", "x = '`'"),
        CodeLine("", "py", "x = '`'\n"),
        CodeLine("```", "py", "", fence=True),
        Table(("| a | b |", "|---|---|")),
        Start(), Span("end"), End(),
    ]  # fmt: skip


def test_a_longer_fence_holds_a_shorter_one() -> None:
    pieces = pieces_of(["````\n```\ninner\n```\n````\nafter"])
    assert [p.line for p in pieces if isinstance(p, CodeLine)] == ["````", "```", "inner", "```", "````"]
    assert Span("after") in pieces


def test_what_looks_like_a_list_is_text() -> None:
    for text in ("-5 degrees", "1.5 litres", "*emphasis* first", "---x", "#hashtag", "2024 was"):
        start, *_ = pieces_of([text])
        assert start == Start(), text


def test_running_text_is_given_out_before_its_line_ends() -> None:
    stream = MarkdownStream()
    assert stream.feed("Hel") == [Start(), Span("Hel")]
    assert stream.feed("lo **wor") == [Span("lo ")]
    assert stream.feed("ld** ") == [Span("world", "bold"), Span(" ")]


def test_code_is_given_out_line_by_line() -> None:
    stream = MarkdownStream()
    stream.feed("```\n")
    assert stream.feed("a = 1\nb") == [CodeLine("a = 1", "", "a = 1")]
    assert stream.finish() == [CodeLine("b", "", "a = 1\nb")]

"""Streaming text is broken between words, fits the terminal and keeps every character."""

from __future__ import annotations

import io
import re
from unittest.mock import PropertyMock, patch

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from hybrid_k2.cli.chat.wrapping import WrappedText
from hybrid_k2.cli.terminal import Output

WORDS = st.lists(st.sampled_from(["a", "bb", "cccc", "ddddddddd", "漢字", "e" * 30, "日本語の文章"]), max_size=30)


def wrapped(chunks: list[str], width: int, hang: str = "") -> list[str]:
    file = io.StringIO()
    with patch.object(Output, "width", new_callable=PropertyMock, return_value=width):
        text = WrappedText(Output(file))
        text.start(hang, hang)
        for chunk in chunks:
            text.write(chunk)
        text.end()
    assert file.getvalue().endswith("\n")
    return file.getvalue().removesuffix("\n").split("\n")


@given(WORDS, st.integers(4, 40), st.sampled_from(["", "  ", "│ "]), st.data())
def test_lines_fit_and_nothing_is_lost(words: list[str], width: int, hang: str, data: st.DataObject) -> None:
    text = " ".join(words)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    lines = wrapped([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)], width, hang)
    assert lines == wrapped([text], width, hang)
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    assert all(line.startswith(hang) for line in lines)
    assert re.sub(r"[\s│]", "", "".join(lines)) == re.sub(r"\s", "", text)


def test_breaks_are_between_words() -> None:
    assert wrapped(["the quick brown fox ju", "mps"], 10) == ["the quick", "brown fox", "jumps"]
    assert wrapped(["item that wraps"], 9, "  ") == ["  item", "  that", "  wraps"]


def test_a_styled_blank_does_not_hang_over_the_edge() -> None:
    assert wrapped(["1234567890 x"], 10) == ["1234567890", "x"]

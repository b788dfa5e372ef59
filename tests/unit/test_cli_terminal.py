"""Control characters never reach a terminal; styles appear only where they may."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.cli.terminal import Output, neutralise


class Screen(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def styled_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


@given(st.text(st.characters(codec="utf-8")))
def test_only_newline_and_tab_survive_of_the_control_characters(text: str) -> None:
    shown = neutralise(text)
    assert {c for c in shown if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}
    replaced = len(text.replace("\r\n", "\n"))
    assert len(shown) == replaced, "one symbol for one character"
    assert [c for c in text if c.isalnum()] == [c for c in shown if c.isalnum()]


@pytest.mark.parametrize(
    ("attack", "shown"),
    [
        ("\x1b]52;c;cm0gLXJmIC8=\x07", "␛]52;c;cm0gLXJmIC8=␇"),  # sets the clipboard
        ("\x1b[2J\x1b[H", "␛[2J␛[H"),  # clears the screen
        ("\x9b31m", "\ufffd31m"),  # the one-character ESC [
        ("safe\rfake", "safe␍fake"),  # writes over the line
        ("a\r\nb", "a\nb"),
        ("x\x08\x7fy\x00", "x␈␡y␀"),
        ("\u202egnp.exe", "\ufffdgnp.exe"),
    ],
)
def test_escape_sequences_are_shown(attack: str, shown: str) -> None:
    assert neutralise(attack) == shown


@pytest.mark.usefixtures("plain_terminal")
def test_a_terminal_without_colours_gets_no_escape_sequence() -> None:
    screen = Screen()
    output = Output(screen)
    output.line("\x1b[31mred", "error")
    assert screen.getvalue() == "␛[31mred\n"
    assert not output.styled


@pytest.mark.usefixtures("styled_terminal")
def test_a_styled_terminal_gets_our_sequences_only() -> None:
    screen = Screen()
    Output(screen).line("\x1b[31mred", "error")
    assert screen.getvalue() == "\x1b[1;31m␛[31mred\x1b[0m\n"


@pytest.mark.usefixtures("styled_terminal")
def test_an_empty_no_color_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    assert Output(Screen()).styled
    monkeypatch.setenv("TERM", "dumb")
    assert not Output(Screen()).styled


def test_a_file_gets_the_data_unchanged() -> None:
    file = io.StringIO()
    Output(file).write("\x1b[31m\x00", "bold")
    assert file.getvalue() == "\x1b[31m\x00"

"""How typed and pasted lines become one message."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hybrid_k2.cli.chat.line_input import BLOCK, MORE, LineInput, Typed, assemble, history_path
from hybrid_k2.cli.terminal import Output


def typing(lines: list[str], prompts: list[str]) -> Callable[[str], str]:
    source: Iterator[str] = iter(lines)

    def next_line(prompt: str) -> str:
        prompts.append(prompt)
        try:
            return next(source)
        except StopIteration:
            raise EOFError from None

    return next_line


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hello"], "hello"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["one\\"], "one\n"),
        (['"""', "a", "", "  b\\", '"""'], "a\n\n  b\\"),
        (['"""one line"""'], "one line"),
        (['  """first', 'last"""  '], "first\nlast"),
        (['"""', "cut off"], "cut off"),
        (["pasted\nlines\nstay"], "pasted\nlines\nstay"),
        (['"""\npasted\nblock\n"""'], "pasted\nblock"),
        (['not a block: """'], 'not a block: """'),
    ],
)
def test_messages(lines: list[str], message: str) -> None:
    prompts: list[str] = []
    assert assemble(typing(lines, prompts), "? ") == Typed(message, block=lines[0].lstrip().startswith(BLOCK))
    assert prompts[0] == "? "
    assert set(prompts[1:]) <= {MORE}


def test_the_end_of_the_input_before_a_message() -> None:
    with pytest.raises(EOFError):
        assemble(typing([], []))


def test_the_history_follows_the_xdg_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "hybrid-k2" / "history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/invalid")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local" / "state" / "hybrid-k2" / "history"


class Typewriter(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_without_a_home_the_history_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("readline")

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("sys.stdin", Typewriter())
    monkeypatch.setattr("sys.stdout", Typewriter())
    monkeypatch.setattr("builtins.input", lambda _: "hello")
    notes = io.StringIO()
    keyboard = LineInput(Output(notes))
    assert keyboard.read() == Typed("hello")
    assert re.fullmatch("the history is not kept: home folder: .*\n", notes.getvalue())


def test_a_prompt_with_a_name_of_the_model_is_harmless(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("answer\n"))
    keyboard = LineInput(Output(sys.stderr))
    assert keyboard.read("\x1b]0;title\x07tool> ") == Typed("answer")
    assert capsys.readouterr().err == "␛]0;title␇tool> "

"""A reply drawn on a terminal: words wrapped, code as it is, tables aligned, nothing that the model can abuse."""

from __future__ import annotations

import re
from unittest.mock import PropertyMock, patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_k2.cli.chat.markdown_view import MarkdownView, is_separator, split_row
from hybrid_k2.cli.terminal import Output
from tests.unit.test_cli_markdown import TEXTS
from tests.unit.test_cli_terminal import Screen

SGR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def drawn(text: str, width: int = 60) -> str:
    screen = Screen()
    with patch.object(Output, "width", new_callable=PropertyMock, return_value=width):
        view = MarkdownView(Output(screen))
        for character in text:
            view.feed(character)
        view.finish()
    return screen.getvalue()


def test_code_keeps_its_text_and_gets_colours() -> None:
    code = 'def f(x):\n\t"""One\n\n    two."""\n\n    return f"{x}"  # end\n\n\n'
    shown = drawn(f"```python\n{code}```\n")
    assert (
        SGR.sub("", shown) == f"```python\n{code}```\n".expandtabs(4) or SGR.sub("", shown) == f"```python\n{code}```\n"
    )
    assert len(SGR.findall(shown)) > 10


def test_an_unknown_language_is_shown_as_it_is() -> None:
    assert SGR.sub("", drawn("```no-such-language x\na <b>\n```")) == "```no-such-language x\na <b>\n```\n"


def test_a_table_is_aligned() -> None:
    shown = SGR.sub("", drawn("| name | n |\n|---|--:|\n| **a** | 1 |\n| b \\| c | 22 |\n\nend"))
    rows = [line.rstrip() for line in shown.splitlines() if line.strip()]
    assert rows[0].split() == ["name", "n"]
    assert len(rows[2]) == len(rows[3]), "the numbers end in one column"
    assert rows[2].split() == ["a", "1"]
    assert rows[3].split() == ["b", "|", "c", "22"]
    assert rows[4] == "end"


def test_rows_without_a_separator_are_text() -> None:
    assert drawn("| not | a table\n") == "| not | a table\n"


@given(TEXTS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_letters_are_neither_lost_nor_doubled(text: str) -> None:
    shown = SGR.sub("", drawn(text))
    assert [c for c in shown if c.isalnum()] == [c for c in text if c.isalnum()]


@given(st.lists(st.sampled_from(["\x1b", "[2J", "\x9b", "\r", "\x07", "`", "```sh\n", "\n", "|", "|-|\n", "**", "a"])))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_no_control_sequence_of_the_model_comes_through(parts: list[str]) -> None:
    ours = SGR.sub("", drawn("".join(parts)))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ours)


def test_split_row() -> None:
    assert split_row(r"| a | b \| c | |") == ["a", "b | c", ""]
    assert split_row("a|b") == ["a", "b"]
    assert is_separator([":--", ":-:", "-"])
    assert not is_separator(["", "-"])

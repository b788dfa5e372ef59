"""A reply on the screen: parts apart, the answer alone on stdout, figures that are right."""

from __future__ import annotations

import io

import pytest

from hybrid_k2.cli.chat.reply_view import ReplyView, figures
from hybrid_k2.cli.terminal import Output
from hybrid_k2.protocol import Event
from tests.unit.test_cli_markdown_view import SGR
from tests.unit.test_cli_terminal import Screen

EVENTS = [
    Event("reasoning", "I add\nthem."),
    Event("reasoning", " Done."),
    Event("content", "It is **42**"),
    Event("content", "."),
    Event("tool_call_begin", index=0, id="functions.add:0", name="add"),
    Event("tool_call_arguments", '{"a": 1}', index=0),
    Event("tool_call_end", index=0),
    Event("tool_call_begin", index=1, id="functions.now:1", name="now"),
    Event("tool_call_arguments", "{}", index=1),
    Event("tool_call_end", index=1),
]


def show(events: list[Event], answer: io.StringIO, notes: io.StringIO, stopped: bool = False) -> None:
    view = ReplyView(Output(answer), Output(notes))
    for event in events:
        view.show(event)
    view.finish(stopped)


def test_plain_parts_have_marks_and_stdout_has_the_answer_alone() -> None:
    answer, notes = io.StringIO(), io.StringIO()
    show(EVENTS, answer, notes)
    assert answer.getvalue() == "It is **42**.\n"
    assert notes.getvalue() == (
        '[thinking]\nI add\nthem. Done.\n\n[answer]\n[tool call] add {"a": 1}\n[tool call] now {}\n'
    )


def test_an_answer_without_thinking_needs_no_mark() -> None:
    answer, notes = io.StringIO(), io.StringIO()
    show([Event("content", "Hello.\n")], answer, notes)
    assert (answer.getvalue(), notes.getvalue()) == ("Hello.\n", "")


def test_a_stopped_reply_says_so_on_a_line_of_its_own() -> None:
    both = io.StringIO()
    show([Event("content", "Once upon")], both, both, stopped=True)
    assert both.getvalue() == "Once upon\n[stopped]\n"


def test_the_terminal_shows_the_same_parts_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    show(EVENTS, screen, screen)
    assert SGR.sub("", screen.getvalue()) == ('thinking\nI add\nthem. Done.\n\nIt is 42.\n→ add {"a": 1}\n→ now {}\n')
    assert "\x1b[1m42\x1b[0m" in screen.getvalue()
    assert "\x1b[2mI\x1b[0m" in screen.getvalue()


def test_the_line_about_a_long_prompt_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    view = ReplyView(Output(screen), Output(screen))
    view.show_prefill(0, 1000)
    view.show_prefill(512, 1000)
    view.show_prefill(1000, 1000)
    view.show(Event("content", "Hi"))
    view.finish()
    shown = SGR.sub("", screen.getvalue())
    assert "512 of 1000" in shown
    assert shown.endswith("\r\x1b[KHi\n")


def test_figures() -> None:
    from hybrid_k2.engine.reply import Reply, Timings, Usage

    reply = Reply(
        content="",
        reasoning="",
        tool_calls=(),
        finish_reason="stop",
        matched_stop=None,
        seed=1,
        usage=Usage(prompt_tokens=300, cached_tokens=100, completion_tokens=50, reasoning_tokens=20),
        timings=Timings(1.0, 2.0, 200.0, 24.52, 0.6449),
        token_ids=(),
    )
    assert figures(reply) == (
        "50 tokens (20 thinking) · prefill 200 at 200 tok/s · decode 24.5 tok/s · 64 % of memory limit"
    )

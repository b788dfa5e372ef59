"""Ctrl-C asks first and insists then; the handler and the terminal are as before afterwards."""

from __future__ import annotations

import io
import os
import pty
import signal
import termios
from typing import Any

import pytest

from hybrid_k2.cli.chat.interrupt import no_echo, on_ctrl_c
from hybrid_k2.cli.chat.one_shot import answer_once
from hybrid_k2.cli.chat.options import ChatOptions
from hybrid_k2.cli.terminal import Output
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.protocol import Event


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_press_asks_and_the_second_insists() -> None:
    before = signal.getsignal(signal.SIGINT)
    asked: list[bool] = []
    with on_ctrl_c(lambda: asked.append(True)):
        press()
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt):
            press()
    assert asked == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_keys_are_not_shown_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    keyboard, child = pty.openpty()
    with os.fdopen(child) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        before = termios.tcgetattr(terminal)
        assert before[3] & termios.ECHO
        with no_echo():
            assert not termios.tcgetattr(terminal)[3] & termios.ECHO
        assert termios.tcgetattr(terminal) == before
        monkeypatch.undo()
    os.close(keyboard)


def test_one_answer_that_is_interrupted_while_it_is_shown_ends_its_request() -> None:
    class Reply:
        model, closed = "k2", False

        def start(self, *_: object) -> Any:
            return self

        def __iter__(self) -> Any:
            yield Event("content", "Once upon a time")

        def close(self) -> None:
            self.closed = True

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    reply = Reply()
    with pytest.raises(KeyboardInterrupt):
        answer_once(reply, ChatOptions(SamplingParams()), "hi", Output(Screen()), Output(io.StringIO()), as_json=False)  # type: ignore[arg-type]
    assert reply.closed

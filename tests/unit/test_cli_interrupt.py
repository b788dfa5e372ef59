"""Ctrl-C asks first and insists then; the handler and the terminal are as before afterwards."""

from __future__ import annotations

import os
import pty
import signal
import termios

import pytest

from hybrid_k2.cli.chat.interrupt import no_echo, on_ctrl_c


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

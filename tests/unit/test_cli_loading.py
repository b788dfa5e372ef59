"""Loading is shown: a bar on a terminal, lines in a file."""

from __future__ import annotations

import io
import itertools

import pytest

from hybrid_k2.cli import loading
from hybrid_k2.cli.terminal import Output
from tests.unit.test_cli_terminal import Screen


def test_a_file_gets_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0, 4)  # the clock goes on by four seconds between two reports
    monkeypatch.setattr(loading.time, "monotonic", lambda: float(next(seconds)))
    file = io.StringIO()
    speed = loading.Speed()
    with loading.show_progress(Output(file), speed) as report:
        for done in (1, 2, 3, 4, 4, 5, 5.5):
            report(int(done * 2**30), 8 << 30)
    assert file.getvalue().splitlines() == [
        "loading: 50 % of 8.00 GiB, 256.00 MiB/s, 16 s left",
        "loading: 68 % of 8.00 GiB, 128.00 MiB/s, 20 s left",  # at the speed since the line before
    ]
    assert speed.summary() == "read 5.50 GiB at 192.00 MiB/s"


def test_a_disk_that_stands_still_has_no_time_left_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0, 20)
    monkeypatch.setattr(loading.time, "monotonic", lambda: float(next(seconds)))
    file = io.StringIO()
    with loading.show_progress(Output(file), loading.Speed()) as report:
        for done in (1, 1, 2):
            report(done << 30, 500 << 30)
    assert file.getvalue().splitlines() == [
        "loading: 0 % of 500.00 GiB, 0 B/s",
        "loading: 0 % of 500.00 GiB, 51.20 MiB/s, 166 min left",
    ]


def test_a_load_of_no_time_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.time, "monotonic", lambda: 5.0)
    speed = loading.Speed()
    assert speed.summary() == "read 0 B"
    speed.report(3 << 20)
    speed.report(4 << 20)
    assert speed.summary() == "read 4.00 MiB"


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    with loading.show_progress(Output(screen), loading.Speed()) as report:
        assert screen.getvalue() == "", "the plan is printed before the bar appears"
        report(1 << 30, 4 << 30)
    assert "1.0/4.0 GiB" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K"), "the line is empty again"

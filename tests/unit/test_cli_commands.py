"""What is typed becomes a command, a message, or one clear refusal."""

from __future__ import annotations

import pytest

from hybrid_k2.cli.chat.commands import COMMANDS, Invocation, completions, help_lines, parse_command
from hybrid_k2.errors import RequestError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hello", None),
        (" /help is what I typed", None),
        ("/help", Invocation("help", "")),
        ("/HELP ", Invocation("help", "")),
        ("/?", Invocation("help", "")),
        ("/quit", Invocation("exit", "")),
        ("/think", Invocation("think", "")),
        ("/think  off", Invocation("think", "off")),
        ("/system You are terse.\nVery.", Invocation("system", "You are terse.\nVery.")),
        ("/save my chat.json", Invocation("save", "my chat.json")),
    ],
)
def test_lines(line: str, expected: Invocation | None) -> None:
    assert parse_command(line) == expected


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("/sav x", "/sav: no such command", "did you mean /save?"),
        ("/regenerate", "/regenerate: no such command", "/regen"),
        ("/zzzzzz", "/zzzzzz: no such command", "/help lists the commands"),
        ("/", "/: no such command", "/help"),
        ("/usr/bin/python is what?", "/usr/bin/python: no such command", "put a space before the /"),
        ("/save", "/save: expected FILE behind it", "/save FILE"),
        ("/clear all", "/clear: expected nothing behind it, got 'all'", ""),
        ("/think maybe", "/think: expected on or off, got 'maybe'", ""),
        ("/stats\nmore", "/stats: no such command", ""),
    ],
)
def test_refusals(line: str, message: str, hint: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_command(line)
    assert caught.value.message == message
    assert hint in (caught.value.hint or "")


def test_every_command_is_in_help_and_is_completed() -> None:
    shown = "\n".join(left for left, _ in help_lines())
    for command in COMMANDS:
        assert f"/{command.name}" in shown
        assert f"/{command.name}" in completions(f"/{command.name[:2]}")
    assert completions("") == []

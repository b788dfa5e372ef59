"""The commands of the chat, and how a typed line becomes one."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from hybrid_k2.cli.chat.files import path_completions
from hybrid_k2.errors import RequestError


class Command(NamedTuple):
    """A command as `/help` shows it; `argument` is empty, `NAME` (needed) or `[NAME]` (optional)."""

    name: str
    argument: str
    summary: str


COMMANDS = (
    Command("help", "", "show the commands and keys"),
    Command("think", "[on|off]", "switch thinking, or say whether it is on"),
    Command("system", "[TEXT|off]", "set, remove or show the system prompt"),
    Command("image", "[FILE|off]", "add an image to the next message, drop those added, or list them"),
    Command("video", "[FILE|off]", "the same with videos"),
    Command("clear", "", "forget the conversation (the system prompt stays)"),
    Command("regen", "", "answer the last message again"),
    Command("save", "FILE", "save the conversation as JSON"),
    Command("load", "FILE", "go on with a saved conversation"),
    Command("stats", "", "show the model, the memory and the speed so far"),
    Command("exit", "", "leave (also /quit and Ctrl-D)"),
)
KEYS = (
    ("\\ at line end", "go on with the message on the next line"),
    ('""" … """', "a message of several lines; pasted lines stay together, too"),
    ("Ctrl-C", "stop the reply; at the prompt: clear the line"),
    ("Up, Down, Ctrl-R", "earlier messages"),
    ("space, then /", "send a message that begins with /"),
)
_ALIASES = {"quit": "exit", "?": "help"}
_BY_NAME = {command.name: command for command in COMMANDS}


class Invocation(NamedTuple):
    """A command with what was typed behind it."""

    name: str
    argument: str


def parse_command(line: str) -> Invocation | None:
    """Return the command of a line, or None if the line is a message.

    Raises: RequestError: an unknown command, a missing argument or one that is not taken.
    """
    if not line.startswith("/"):
        return None
    typed, _, argument = line[1:].partition(" ")
    typed, argument = typed.strip().lower(), argument.strip()
    command = _BY_NAME.get(_ALIASES.get(typed, typed))
    if command is None or "\n" in typed:
        raise RequestError(f"/{typed.split(chr(10))[0]}: no such command", hint=_suggestion(typed))
    if argument and not command.argument:
        raise RequestError(f"/{command.name}: expected nothing behind it, got '{argument}'")
    if not argument and command.argument and not command.argument.startswith("["):
        raise RequestError(f"/{command.name}: expected {command.argument} behind it", hint=usage(command))
    if command.name == "think" and argument.lower() not in ("", "on", "off"):
        raise RequestError(f"/think: expected on or off, got '{argument}'")
    return Invocation(command.name, argument)


def usage(command: Command) -> str:
    """Return the command as one types it."""
    return f"/{command.name} {command.argument}".rstrip()


def completions(text: str) -> list[str]:
    """Return the commands that begin with a typed text, or behind one that takes a file, the paths that do."""
    typed, space, path = text.partition(" ")
    command = _BY_NAME.get(typed[1:]) if space and typed.startswith("/") else None
    if command is not None and "FILE" in command.argument:
        return [f"{typed} {found}" for found in path_completions(path)]
    return [f"/{command.name}" for command in COMMANDS if text and f"/{command.name}".startswith(text)]


def help_lines() -> list[tuple[str, str]]:
    """Return what `/help` shows: what to type, and what it does."""
    return [*((usage(command), command.summary) for command in COMMANDS), *KEYS]


def _suggestion(typed: str) -> str:
    near = difflib.get_close_matches(typed, [*_BY_NAME, *_ALIASES], n=1, cutoff=0.5)
    known = f"did you mean /{near[0]}?" if near else "/help lists the commands"
    return f"{known} (put a space before the / to send the line as a message)"

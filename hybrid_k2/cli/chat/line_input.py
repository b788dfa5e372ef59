"""Read messages at the prompt: several lines, pasted text, history."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from hybrid_k2.cli.chat.commands import completions
from hybrid_k2.cli.state import state_folder
from hybrid_k2.cli.terminal import Output, neutralise
from hybrid_k2.errors import ConfigError, RequestError

PROMPT, MORE = "> ", "… "
BLOCK = '"""'
HISTORY_LENGTH = 1000


def history_path() -> Path:
    """Return the file of the history. Raises: ConfigError: there is no place for it."""
    return state_folder() / "history"


class Typed(NamedTuple):
    """A message as it was typed; the text of a block is never a command."""

    text: str
    block: bool = False


def assemble(next_line: Callable[[str], str], prompt: str = PROMPT) -> Typed:
    r"""Return one message: a line, lines that end with a backslash and one more, or a block between two \"\"\".

    `next_line` shows a prompt and returns a line (several lines, if they were pasted). The end of the input within a
    message ends the message; before one it is an EOFError.
    """
    text = next_line(prompt)
    if text.lstrip().startswith(BLOCK):
        return Typed(_block(text.lstrip().removeprefix(BLOCK), next_line), block=True)
    try:
        while text.endswith("\\"):
            text = text[:-1] + "\n"
            text += next_line(MORE)
    except EOFError:
        pass
    return Typed(text)


def _block(text: str, next_line: Callable[[str], str]) -> str:
    try:
        while not text.rstrip().endswith(BLOCK):
            text += "\n" + next_line(MORE)
        text = text.rstrip().removesuffix(BLOCK)
    except EOFError:
        pass
    return text.strip("\n")


class LineInput:
    """The keyboard; with readline where Python has it. A history that cannot be kept is said once and done without."""

    def __init__(self, notes: Output) -> None:
        self._notes = notes
        self._readline = _open_readline() if sys.stdin.isatty() and sys.stdout.isatty() else None
        self._history: Path | None = None  # None: it is not kept
        self._styled_prompts = notes.styled and self._readline is not None and not self._is_libedit()
        self._load_history()

    def read(self, prompt: str = PROMPT) -> Typed:
        """Return the next message.

        Raises: EOFError at the end of the input; KeyboardInterrupt on Ctrl-C; RequestError for what is not text.
        """
        typed = assemble(self._next_line, prompt)
        self._remember(typed.text)
        return typed

    def ask(self, question: str) -> bool:
        """Ask a question that is answered with y or n; everything but y is no."""
        try:
            return self._next_line(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False

    def _next_line(self, prompt: str) -> str:
        prompt = neutralise(prompt)  # readline prints it as it is, and it may hold a name that the model made up
        try:
            return self._edited_line(prompt) if self._readline else self._plain_line(prompt)
        except UnicodeDecodeError as error:
            raise RequestError(f"keyboard: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}") from error

    def _edited_line(self, prompt: str) -> str:
        # readline must know which characters of the prompt take no room: \x01 and \x02 stand around them.
        shown = f"\x01\x1b[1;32m\x02{prompt}\x01\x1b[0m\x02" if self._styled_prompts else prompt
        return input(shown).rstrip("\r\n") + self._pasted_lines()

    def _plain_line(self, prompt: str) -> str:
        self._notes.write(prompt, "prompt")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def _pasted_lines(self) -> str:
        """Return the lines that lie ready behind the first: a paste, where readline cannot tell pastes from typing."""
        lines = ""
        while self._is_libedit() and select.select([sys.stdin], [], [], 0.01)[0]:
            lines += "\n" + input("")
        return lines

    def _is_libedit(self) -> bool:
        return self._readline is not None and "libedit" in (self._readline.__doc__ or "")

    def _load_history(self) -> None:
        if self._readline is None:
            return
        try:
            self._history = history_path()
            self._history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self._history, os.O_CREAT | os.O_RDONLY, 0o600))
            self._readline.read_history_file(self._history)
            self._readline.set_history_length(HISTORY_LENGTH)
        except (OSError, ConfigError) as error:
            self._without_history(error)

    def _remember(self, text: str) -> None:
        readline = self._readline
        if readline is None or not text.strip():
            return
        length = readline.get_current_history_length()
        if length and readline.get_history_item(length) == text:
            return
        readline.add_history(text)
        if self._history is not None:
            try:
                readline.write_history_file(self._history)
            except OSError as error:
                self._without_history(error)

    def _without_history(self, error: OSError | ConfigError) -> None:
        reason = error.message if isinstance(error, ConfigError) else f"{self._history}: {error.strerror}"
        self._notes.line(f"the history is not kept: {reason}", "dim")
        self._history = None


def _open_readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    readline.set_auto_history(False)
    readline.set_completer_delims("")
    readline.set_completer(_completer())
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return readline


def _completer() -> Callable[[str, int], str | None]:
    """Return what readline asks for one completion after the other; they are looked up when it begins."""
    found: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            found[:] = completions(text)
        return found[state] if state < len(found) else None

    return complete

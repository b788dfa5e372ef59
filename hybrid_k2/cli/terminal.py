"""Write text to a terminal or a file: plain or styled, never with a control character that is not ours.

Text of a model, a file or a checkpoint is untrusted: an escape sequence in it could move the cursor, change the
clipboard or answer for the user. On a terminal every control character but newline and tab is shown as a symbol.
Files and pipes get the text as it is: there it is data.
"""

from __future__ import annotations

import io
import os
from functools import cached_property
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {
    "": "",
    "dim": "2",
    "bold": "1",
    "italic": "3",
    "bold italic": "1;3",
    "strike": "9",
    "code": "36",
    "link": "4",
    "heading": "1;35",
    "error": "1;31",
    "warning": "33",
    "prompt": "1;32",
    "call": "34",
}
DEFAULT_WIDTH = 80

# C0 and DEL have symbols of their own; C1 (an 8-bit ESC [ is one character of it) and the two overrides of the
# writing direction, which make text read other than it is, become the replacement character.
_SYMBOLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_SYMBOLS |= {0x7F: 0x2421}
_SYMBOLS |= dict.fromkeys([*range(0x80, 0xA0), 0x202D, 0x202E], 0xFFFD)


def neutralise(text: str) -> str:
    """Return the text with every control character but newline and tab replaced by a visible symbol."""
    return text.replace("\r\n", "\n").translate(_SYMBOLS)


def is_styled(file: TextIO) -> bool:
    """Say whether colours and attributes may be written to a file (`NO_COLOR`, `TERM=dumb` and pipes forbid them)."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


class Nowhere(io.StringIO):
    """A file that forgets what is written to it."""

    def write(self, text: str, /) -> int:
        """Forget the text."""
        return len(text)


class Output:
    """One of stdout and stderr; `styled` says whether escape sequences may be written to it."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.tty = file.isatty()
        self.styled = is_styled(file)

    @property
    def width(self) -> int:
        """The columns of the terminal now; 80 where there is none."""
        try:
            return os.get_terminal_size(self.file.fileno()).columns or DEFAULT_WIDTH
        except (OSError, ValueError):
            return DEFAULT_WIDTH

    @cached_property
    def console(self) -> Console:
        """A rich console on the same file, for progress bars, tables and code."""
        from rich.console import Console

        return Console(file=self.file, force_terminal=self.styled, no_color=not self.styled, highlight=False)

    def write(self, text: str, style: str = "") -> None:
        """Write and flush; the style takes effect only where escape sequences may be written."""
        if self.tty:
            text = neutralise(text)
        if style and self.styled and text:
            text = f"\x1b[{STYLES[style]}m{text}\x1b[0m"
        self.file.write(text)
        self.file.flush()

    def erase_line(self) -> None:
        """Take away what was written to the line of the cursor."""
        if self.styled:
            self.file.write("\r\x1b[K")
            self.file.flush()

    def line(self, text: str = "", style: str = "") -> None:
        """Write the text and a newline."""
        self.write(text, style)
        self.file.write("\n")
        self.file.flush()

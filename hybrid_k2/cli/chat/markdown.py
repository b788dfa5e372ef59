"""Markdown as it streams: text goes out word by word, code line by line, a table when it is whole.

Nothing that was given out is ever taken back, so the terminal needs no redrawing, and resizing cannot hurt. What is not
understood stays as it was written.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from hybrid_k2.cli.chat.inline import InlineParser, Span


class Start(NamedTuple):
    """A line of running text begins with `mark`; the lines that it wraps into begin with `hang`."""

    mark: str = ""
    hang: str = ""


class End(NamedTuple):
    """The line of running text ends."""


class Rule(NamedTuple):
    """A horizontal rule."""


class CodeLine(NamedTuple):
    """One line of a fenced block; `block` is all of it up to here, `fence` says that the line is a fence itself."""

    line: str
    language: str
    block: str
    fence: bool = False


class Table(NamedTuple):
    """A whole table as its source lines."""

    lines: tuple[str, ...]


Piece = Span | Start | End | Rule | CodeLine | Table

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([^`]*)")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+")
_BULLET = re.compile(r"([ \t]*)([-*+])([ \t]+)(?=\S)")
_NUMBER = re.compile(r"([ \t]*)(\d{1,9}[.)])([ \t]+)(?=\S)")
_QUOTE = re.compile(r" {0,3}>[ \t]?")
_RULE = re.compile(r" {0,3}([-*_])([ \t]*\1){2,}[ \t]*")
# The beginning of a line that may still become more than one of the above.
_UNDECIDED = re.compile(r"[ \t]*(#{1,6}[ \t]*|[-*_+][-*_ \t]*|\d{1,9}|\d{1,9}[.)][ \t]*|`{1,2}|~{1,2}|>)?")
_WHOLE_LINE = re.compile(r"[ \t]*(`{3}|~{3}|\|)")


class MarkdownStream:
    """Pieces of a Markdown text; `feed` it as it comes, `finish` at its end."""

    def __init__(self) -> None:
        self._line = ""  # of the current line, what has not been given to `_inline`
        self._inline: InlineParser | None = None  # set once the current line is known to be running text
        self._fence = ""  # the opening fence while inside a code block
        self._language = ""
        self._block: list[str] = []
        self._rows: list[str] = []

    def feed(self, text: str) -> list[Piece]:
        """Take more text and return the pieces that are certain now."""
        pieces: list[Piece] = []
        *lines, rest = text.split("\n")
        for line in lines:
            pieces += self._take(line)
            pieces += self._end_line()
        return pieces + self._take(rest)

    def finish(self) -> list[Piece]:
        """Return what is left; the last line ends here if it had no newline."""
        return (self._end_line() if self._line or self._inline else []) + self._end_table()

    def _take(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._inline is not None:
            return list(self._inline.feed(text))
        self._line += text
        if self._fence or _UNDECIDED.fullmatch(self._line) or _WHOLE_LINE.match(self._line):
            return []
        return self._end_table() + self._begin_text()

    def _begin_text(self) -> list[Piece]:
        """Decide what line of running text begins here."""
        line, style, start = self._line, "", Start()
        if heading := _HEADING.match(line):
            line, style = line[heading.end() :], "heading"
        elif item := _BULLET.match(line) or _NUMBER.match(line):
            mark = f"{item[1]}{'•' if item[2] in '-*+' else item[2]} "
            line, start = line[item.end() :], Start(mark, " " * len(mark))
        elif quote := _QUOTE.match(line):
            line, start = line[quote.end() :], Start("│ ", "│ ")
        elif indent := line[: len(line) - len(line.lstrip())]:
            line, start = line.lstrip(), Start(indent, indent)
        self._line, self._inline = "", InlineParser(style)
        return [start, *self._inline.feed(line)]

    def _end_line(self) -> list[Piece]:
        line, self._line = self._line, ""
        if self._inline is not None:
            left, self._inline = self._inline.finish(), None
            return [*left, End()]
        if self._fence:
            return [self._code(line)]
        if line.lstrip().startswith("|"):
            self._rows.append(line)
            return []
        return self._end_table() + self._whole_line(line)

    def _whole_line(self, line: str) -> list[Piece]:
        """Return the pieces of a line that was undecided to its end."""
        if opened := _FENCE.fullmatch(line):
            self._fence, self._language = opened[1], opened[2].strip()
            self._block = []
            return [CodeLine(line, self._language, "", fence=True)]
        if _RULE.fullmatch(line):
            return [Rule()]
        self._line = line
        pieces = self._begin_text()
        assert self._inline is not None
        left, self._inline = self._inline.finish(), None
        return [*pieces, *left, End()]

    def _code(self, line: str) -> CodeLine:
        mark = line.strip()
        if mark.startswith(self._fence) and not mark.strip(self._fence[0]):
            self._fence = ""
            return CodeLine(line, self._language, "", fence=True)
        self._block.append(line)
        return CodeLine(line, self._language, "\n".join(self._block))

    def _end_table(self) -> list[Piece]:
        rows, self._rows = tuple(self._rows), []
        return [Table(rows)] if rows else []

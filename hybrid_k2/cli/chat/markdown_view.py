"""Draw the pieces of a Markdown text on a terminal as they come."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hybrid_k2.cli.chat.inline import Span, parse_line
from hybrid_k2.cli.chat.markdown import CodeLine, End, MarkdownStream, Piece, Rule, Start, Table
from hybrid_k2.cli.chat.wrapping import WrappedText
from hybrid_k2.cli.terminal import Output, neutralise

if TYPE_CHECKING:
    from rich.text import Text

_RICH_STYLES = {"code": "cyan", "link": "underline", "heading": "bold magenta", "": ""}
_SEPARATOR = re.compile(r":?-+:?")
MOST_HIGHLIGHTED = 300  # lines of a code block; the highlighter reads the block anew for each line


class MarkdownView:
    """A reply drawn on a styled `Output`; after `finish` the cursor is at the start of a line."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self._stream = MarkdownStream()
        self._text = WrappedText(output)

    def feed(self, text: str) -> None:
        """Draw what has become certain."""
        self._draw(self._stream.feed(neutralise(text)))

    def finish(self) -> None:
        """Draw the rest."""
        self._draw(self._stream.finish())

    def _draw(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            match piece:
                case Start(mark, hang):
                    self._text.start(mark, hang)
                case Span(text, style):
                    self._text.write(text, style)
                case End():
                    self._text.end()
                case Rule():
                    self.output.line("─" * min(self.output.width, 60), "dim")
                case CodeLine():
                    self._draw_code(piece)
                case Table(lines):
                    self._draw_table(lines)

    def _draw_code(self, code: CodeLine) -> None:
        if code.fence:
            self.output.line(code.line, "dim")
            return
        if not code.language or code.block.count("\n") >= MOST_HIGHLIGHTED:
            self.output.line(code.line, "code")
            return
        from rich.syntax import Syntax

        syntax = Syntax("", code.language.split()[0], theme="ansi_dark", background_color="default")
        highlighted = syntax.highlight(code.block)
        highlighted.rstrip()
        line = highlighted.split("\n", allow_blank=True)[-1]
        # The highlighter may drop blank lines at the end of a block: what it returns is shown only if it is this line.
        if line.plain == code.line:
            self.output.console.print(line, soft_wrap=True)
        else:
            self.output.line(code.line, "code")

    def _draw_table(self, lines: tuple[str, ...]) -> None:
        rows = [split_row(line) for line in lines]
        if len(rows) < 2 or not is_separator(rows[1]):
            for line in lines:
                self.output.line(line)
            return
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        columns = max(len(row) for row in rows)
        for column in range(columns):
            mark = rows[1][column] if column < len(rows[1]) else ""
            right, center = mark.endswith(":"), mark.startswith(":") and mark.endswith(":")
            title = rows[0][column] if column < len(rows[0]) else ""
            table.add_column(cell(title), justify="center" if center else "right" if right else "left", overflow="fold")
        for row in rows[2:]:
            table.add_row(*(cell(text) for text in row))
        self.output.console.print(table, width=min(self.output.width, 120))


def split_row(line: str) -> list[str]:
    r"""Return the cells of a table row; a bar written as `\|` belongs to its cell."""
    inner = line.strip().removeprefix("|")
    if inner.endswith("|") and not inner.endswith("\\|"):
        inner = inner[:-1]
    cells, current = [], ""
    for character in inner:
        if character == "|" and not current.endswith("\\"):
            cells.append(current.strip())
            current = ""
        else:
            current = current[:-1] + "|" if character == "|" else current + character
    return [*cells, current.strip()]


def is_separator(row: list[str]) -> bool:
    """Say whether a row is the `---|:--:` line below the head of a table."""
    return all(_SEPARATOR.fullmatch(cell) for cell in row)


def cell(text: str) -> Text:
    """Return the text of a table cell with its inline styles."""
    from rich.text import Text

    shown = Text()
    for span in parse_line(text):
        shown.append(span.text, style=_RICH_STYLES.get(span.style, span.style))
    return shown

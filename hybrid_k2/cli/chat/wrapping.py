"""Break running text between words at the width of the terminal, while it streams."""

from __future__ import annotations

import re

from rich.cells import cell_len

from hybrid_k2.cli.terminal import Output

_WORD = re.compile(r"(\s+)")


class WrappedText:
    """Lines of styled text on an `Output`; only the last word waits until it is whole.

    Units: columns are terminal cells (an ideograph takes two).
    """

    def __init__(self, output: Output) -> None:
        self.output = output
        self._hang = ""
        self._column = 0
        self._space = ""  # white space that is written only if the next word stays on this line
        self._space_style = ""
        self._word: list[tuple[str, str]] = []

    def start(self, mark: str = "", hang: str = "") -> None:
        """Begin a line with a mark; the lines that it wraps into begin with `hang`."""
        self._hang, self._column = hang, cell_len(mark)
        self.output.write(mark, "dim")

    def write(self, text: str, style: str = "") -> None:
        """Add text without line breaks to the line."""
        for part in _WORD.split(text):
            if part.isspace():
                self._put_word()
                self._space, self._space_style = self._space + part, style
            elif part:
                self._add_to_word(part, style)

    def end(self) -> None:
        """Finish the line."""
        self._put_word()
        self._space, self._column = "", 0
        self.output.write("\n")

    def _add_to_word(self, part: str, style: str) -> None:
        # Scripts written without spaces may break between any two characters; so must a word longer than a line.
        limit = max(self.output.width - cell_len(self._hang), 1)
        for character in part:
            self._word.append((character, style))
            if cell_len(character) > 1 or len(self._word) >= limit:
                self._put_word()

    def _put_word(self) -> None:
        if not self._word:
            return
        cells = sum(cell_len(character) for character, _ in self._word)
        if self._column > cell_len(self._hang) and self._column + cell_len(self._space) + cells > self.output.width:
            self.output.write("\n")
            self.output.write(self._hang, "dim")
            self._column = cell_len(self._hang)
        else:
            self.output.write(self._space, self._space_style)
            self._column += cell_len(self._space)
        self._column += cells
        self._space = ""
        self._write_runs()

    def _write_runs(self) -> None:
        run, run_style = "", ""
        for character, style in self._word:
            if style != run_style:
                self.output.write(run, run_style)
                run, run_style = "", style
            run += character
        self.output.write(run, run_style)
        self._word = []

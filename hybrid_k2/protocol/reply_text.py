"""The reasoning and the content of a reply, with one rule for white space."""

from __future__ import annotations

from collections.abc import Callable


class ReplyText:
    """Pass reasoning and content on as they come, to the byte.

    Only content that is nothing but white space between two boundaries, one of them a tool marker, is dropped:
    it separates calls and is no answer. White space at the start of content is held until that is decided.
    """

    def __init__(self, emit: Callable[[str, str], None], thinking: bool) -> None:
        self.is_reasoning = thinking
        self._emit = emit
        self._blank: list[str] = []
        self._at_boundary = True
        self._follows_tools = False

    @property
    def just_left_tools(self) -> bool:
        """Whether nothing but white space has come since a tool marker."""
        return self._at_boundary and self._follows_tools

    def write(self, text: str) -> None:
        """Take the next text."""
        if self.is_reasoning:
            self._emit("reasoning", text)
            return
        if self._at_boundary:
            self._blank.append(text)
            if text.isspace():
                return
            self._at_boundary = False
            text = "".join(self._blank)
            self._blank.clear()
        self._emit("content", text)

    def end_reasoning(self) -> None:
        """Let content follow."""
        self.is_reasoning = False

    def meet_tools(self) -> None:
        """Note a tool marker; without effect on reasoning."""
        if not self.is_reasoning:
            self._blank.clear()
            self._at_boundary = self._follows_tools = True

    def finish(self) -> None:
        """Decide about white space still held."""
        if self._blank and not self._follows_tools:
            self._emit("content", "".join(self._blank))
        self._blank.clear()

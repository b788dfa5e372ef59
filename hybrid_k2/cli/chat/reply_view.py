"""Show a reply while it is made: the thinking apart and dim, the answer, tool calls, and one line of figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_k2.cli.chat.markdown_view import MarkdownView
from hybrid_k2.cli.chat.wrapping import WrappedText
from hybrid_k2.cli.terminal import Output

if TYPE_CHECKING:
    from hybrid_k2.engine import Reply
    from hybrid_k2.protocol import Event


class ReplyView:
    """The events of one reply on two outputs: the answer is data, all else goes to the notes.

    On a terminal with styles the answer is drawn as Markdown; elsewhere it is written as it is, and marks in square
    brackets on the notes tell the parts apart.
    """

    def __init__(self, answer: Output, notes: Output) -> None:
        self._answer = answer
        self._notes = notes
        self._markdown = MarkdownView(answer) if answer.styled else None
        self._thinking = WrappedText(notes)
        self._part = ""
        self._marked = False  # a mark in brackets has been written, so the answer needs one as well
        self._at_line_start = True
        self._passing = False  # a line is shown that the next event takes away

    def show(self, event: Event) -> None:
        """Show one event; the last one of a reply, `finish`, has nothing to show."""
        self._take_away()
        match event.kind:
            case "reasoning":
                self._enter("thinking")
                self._think(event.text)
            case "content":
                self._enter("answer")
                self._say(event.text)
            case "tool_call_begin":
                self._enter("tool call")
                self._notes.write(f"{event.name} ", "call")
            case "tool_call_arguments":
                self._notes.write(event.text)
            case "tool_call_end":
                self._leave()

    def show_prefill(self, done: int, total: int) -> None:
        """Show how much of a long prompt has been read, until the reply begins."""
        if self._notes.styled and done < total:
            self._take_away()
            self._notes.write(f"reading the prompt: {done} of {total} tokens", "dim")
            self._passing = True

    def finish(self, stopped: bool = False) -> None:
        """End the reply; the cursor is at the start of a line afterwards."""
        self._take_away()
        self._leave()
        if stopped:
            self._notes.line("[stopped]", "dim")

    def _enter(self, part: str) -> None:
        if part == self._part and part != "tool call":
            return
        self._leave()
        self._part = part
        if self._notes.styled:
            if part == "thinking":
                self._notes.line("thinking", "italic")
            elif part == "tool call":
                self._notes.write("→ ", "dim")
        elif part == "tool call":
            self._notes.write("[tool call] ")
        elif part == "thinking" or self._marked:
            self._notes.line(f"[{part}]")
            self._marked = True

    def _leave(self) -> None:
        """Finish the part that is being shown, up to the end of its line."""
        part, self._part = self._part, ""
        if part == "thinking":
            self._thinking.end()
            self._notes.line()
        elif part == "tool call":
            self._notes.line()
        elif part == "answer" and self._markdown is not None:
            self._markdown.finish()
        elif part == "answer" and not self._at_line_start:
            self._answer.line()

    def _take_away(self) -> None:
        if self._passing:
            self._notes.erase_line()
            self._passing = False

    def _think(self, text: str) -> None:
        if not self._notes.styled:
            self._notes.write(text)
            return
        first, *lines = text.split("\n")
        self._thinking.write(first, "dim")
        for line in lines:
            self._thinking.end()
            self._thinking.write(line, "dim")

    def _say(self, text: str) -> None:
        if self._markdown is not None:
            self._markdown.feed(text)
        elif text:
            self._answer.write(text)
            self._at_line_start = text.endswith("\n")


def say_figures(reply: Reply, notes: Output) -> None:
    """Show the figures of a reply, dim; none of one that was stopped before a server counted it."""
    if not reply.usage.completion_tokens:
        return
    if not notes.tty:
        notes.line(figures(reply))
        return
    line = WrappedText(notes)
    line.write(figures(reply), "dim")
    line.end()


def figures(reply: Reply) -> str:
    """Return the line that is shown after a reply: tokens, speed, share of the memory limit."""
    usage, timings = reply.usage, reply.timings
    thinking = f" ({usage.reasoning_tokens} thinking)" if usage.reasoning_tokens else ""
    read = usage.prompt_tokens - usage.cached_tokens
    parts = [
        f"{usage.completion_tokens} tokens{thinking}",
        f"prefill {read} at {_speed(timings.prefill_tokens_per_s)}",
        f"decode {_speed(timings.decode_tokens_per_s)}",
    ]
    if timings.memory_share is not None:
        parts.append(f"{100 * timings.memory_share:.0f} % of memory limit")
    return " · ".join(parts)


def _speed(tokens_per_s: float | None) -> str:
    if not tokens_per_s:
        return "– tok/s"
    return f"{tokens_per_s:.0f} tok/s" if tokens_per_s >= 100 else f"{tokens_per_s:.1f} tok/s"

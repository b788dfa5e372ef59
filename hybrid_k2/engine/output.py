"""From generated token ids to the events that a reader sees, cut at a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from hybrid_k2.engine.reply import ToolCall
from hybrid_k2.engine.stop import StopMatcher
from hybrid_k2.protocol import Event, Tokenizer


class Parser(Protocol):
    """Turn token ids into events, as `hybrid_k2.protocol.OutputParser` does."""

    def feed(self, token_ids: Iterable[int]) -> list[Event]:
        """Take the next ids."""
        ...

    def finish(self) -> list[Event]:
        """Give what is left."""
        ...


class PlainText:
    """Take everything as content: the parser of a prompt that is not a chat."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.decoder()

    def feed(self, token_ids: Iterable[int]) -> list[Event]:
        """Decode the ids; bytes of an unfinished character wait for the rest."""
        return _content(self._decoder.feed(token_ids))

    def finish(self) -> list[Event]:
        """Give an unfinished character as U+FFFD."""
        return _content(self._decoder.finish())


class Output:
    """Pass a parser's events on, look for stop strings in the content, and keep the text of the whole reply.

    Stop strings are looked for in the content alone: thinking often quotes what it was told not to write, and the
    arguments of a tool must stay whole. A run of content ends where reasoning or a tool call begins.
    """

    def __init__(self, parser: Parser, stop: Sequence[str], include_stop: bool = False) -> None:
        self._parser = parser
        self._stop = StopMatcher(stop, include_stop)
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, _Call] = {}

    @property
    def matched_stop(self) -> str | None:
        """The stop string that was found; no event follows it."""
        return self._stop.matched

    @property
    def content(self) -> str:
        """The content so far."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The complete calls so far, in order."""
        return tuple(
            ToolCall(call.id, call.name, "".join(call.arguments))
            for _, call in sorted(self._calls.items())
            if call.complete
        )

    def feed(self, token_ids: Iterable[int]) -> list[Event]:
        """Take the next ids and return the events that may be shown."""
        return self._show(self._parser.feed(token_ids))

    def finish(self) -> list[Event]:
        """Return what was held back."""
        if self._stop.matched is not None:
            return []
        events = self._show(self._parser.finish())
        return [*events, *self._keep(_content(self._stop.flush()))]

    def _show(self, events: Iterable[Event]) -> list[Event]:
        shown: list[Event] = []
        for event in events:
            if event.kind == "content":
                shown += self._keep(_content(self._stop.feed(event.text)))
                if self._stop.matched is not None:
                    break
            else:
                shown += self._keep([*_content(self._stop.flush()), event])
        return shown

    def _keep(self, events: list[Event]) -> list[Event]:
        for event in events:
            if event.kind == "content":
                self._content.append(event.text)
            elif event.kind == "reasoning":
                self._reasoning.append(event.text)
            elif event.index is not None:
                self._keep_call(event, event.index)
        return events

    def _keep_call(self, event: Event, index: int) -> None:
        if event.kind == "tool_call_begin":
            self._calls[index] = _Call(event.id or "", event.name or "")
        elif event.kind == "tool_call_arguments":
            self._calls[index].arguments.append(event.text)
        elif event.kind == "tool_call_end":
            self._calls[index].complete = True


class _Call:
    def __init__(self, call_id: str, name: str) -> None:
        self.id = call_id
        self.name = name
        self.arguments: list[str] = []
        self.complete = False


def _content(text: str) -> list[Event]:
    return [Event("content", text)] if text else []

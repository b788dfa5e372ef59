"""What the model wrote, as events: reasoning, content and tool calls.

The policies, and why they are what they are, stand in docs/protocol.md.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_k2.protocol.call_arguments import NEXT_AFTER_CALL, ArgumentReader, Ending, Reading
from hybrid_k2.protocol.output_lexer import IdLexer, Item, Mark, Marker, TextLexer
from hybrid_k2.protocol.reply_text import ReplyText
from hybrid_k2.protocol.tokenizer import Tokenizer
from hybrid_k2.protocol.tool_ids import ToolIds
from hybrid_k2.protocol.tool_names import MAX_ID_CHARS, ToolNames

log = logging.getLogger("hybrid_k2")


@dataclass(frozen=True)
class Event:
    """A piece of a reply.

    `kind` is `reasoning`, `content`, `tool_call_begin`, `tool_call_arguments` or `tool_call_end` (an engine adds
    kinds of its own). Tool-call events carry the call's `index` in the reply, its `id` and
    its `name`. A call without a `tool_call_end` was cut short and must not be run.
    """

    kind: str
    text: str = ""
    index: int | None = None
    id: str | None = None
    name: str | None = None


@dataclass
class _Call:
    """A call whose arguments are arriving."""

    id: str
    name: str | None  # None: only the arguments can tell
    index: int = -1
    pending: list[Item] = field(default_factory=list)  # arguments not handed out yet
    has_arguments: bool = False


class OutputParser:
    """Turn one reply, in pieces of any size, into events.

    Feed either ids or text. Joined per kind and index, the events do not depend on how the reply was cut.
    `warnings` lists what was out of order. Time and memory are linear in the reply.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        call_ids: ToolIds | None = None,
    ) -> None:
        """Start a reply. `call_ids`: those of the conversation, to find new ones; None: ids as the model wrote them."""
        self.warnings: list[str] = []
        self._tokenizer = tokenizer
        self._ids: IdLexer | None = None
        self._chars: TextLexer | None = None
        self._finished = False
        self._names = ToolNames(tools)
        self._call_ids = call_ids.copy() if call_ids is not None else None
        self._events: list[Event] = []
        self._queue: deque[Item] = deque()
        self._text = ReplyText(self._emit, thinking is not False)
        self._typed: list[str] = []  # a section begin spelled out in ordinary tokens, and white space after it
        self._header: list[str] | None = None  # the id of a call that is beginning
        self._call: _Call | None = None
        self._arguments = ArgumentReader()
        self._begun = 0
        self._incomplete: list[int] = []

    @property
    def incomplete_calls(self) -> tuple[int, ...]:
        """The indices of calls that began and never ended; final after `finish`."""
        return tuple(self._incomplete)

    def feed(self, token_ids: Iterable[int]) -> list[Event]:
        """Take the next ids of the reply and return the events that they complete.

        Raises: ValueError after `feed_text` or `finish`.
        """
        self._check_open(is_other_used=self._chars is not None)
        self._ids = self._ids or IdLexer(self._tokenizer)
        return self._take(self._ids.feed(token_ids))

    def feed_text(self, text: str) -> list[Event]:
        """Take the next text of the reply, for engines that hand out no ids; markers are matched by name.

        Raises: ValueError after `feed` or `finish`.
        """
        self._check_open(is_other_used=self._ids is not None)
        self._chars = self._chars or TextLexer(self._tokenizer)
        return self._take(self._chars.feed(text))

    def finish(self) -> list[Event]:
        """End the reply and return the events held back; `incomplete_calls` then names the calls cut short."""
        if self._finished:
            return []
        self._finished = True
        lexer = self._ids or self._chars
        self._queue.extend(lexer.finish() if lexer else ())
        self._run()
        while self._call is not None or self._header is not None:
            if self._call is not None:
                self._settle(self._arguments.finish(), is_last=True)
            else:
                self._finish_header()
            self._run()
        self._flush_typed()
        self._text.finish()
        return self._drain()

    def _check_open(self, is_other_used: bool) -> None:
        if self._finished:
            raise ValueError("OutputParser: expected no input after finish(); make one parser for each reply")
        if is_other_used:
            raise ValueError("OutputParser: expected either ids or text for one reply, got both")

    def _take(self, items: Iterable[Item]) -> list[Event]:
        self._queue.extend(items)
        self._run()
        return self._drain()

    def _run(self) -> None:
        while self._queue:
            item = self._queue.popleft()
            if self._call is not None:
                self._in_arguments(item)
            elif self._header is not None:
                self._in_header(item)
            else:
                self._in_text(item)

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # -- reasoning and content

    def _in_text(self, item: Item) -> None:
        if isinstance(item, str):
            if self._typed and item.isspace():
                self._typed.append(item)
                return
            self._flush_typed()
            self._text.write(item)
        elif item.typed:
            self._in_text_typed(item)
        elif item.mark is Mark.CALL_BEGIN:
            self._typed.clear()
            self._header = []
        else:
            self._flush_typed()
            if item.mark in (Mark.THINK_END, Mark.SECTION_BEGIN):
                self._text.end_reasoning()
            if item.mark in (Mark.SECTION_BEGIN, Mark.SECTION_END, Mark.CALL_END):
                self._text.meet_tools()

    def _in_text_typed(self, marker: Marker) -> None:
        """A section marker in ordinary tokens counts next to a call; elsewhere it is prose."""
        self._flush_typed()
        if marker.mark is Mark.SECTION_BEGIN:
            self._typed.append(marker.text)
        elif self._text.just_left_tools:
            self._text.meet_tools()
        else:
            self._text.write(marker.text)

    def _flush_typed(self) -> None:
        typed, self._typed = self._typed, []
        for text in typed:
            self._text.write(text)

    # -- the id of a call

    def _in_header(self, item: Item) -> None:
        assert self._header is not None
        if isinstance(item, Marker) and not item.typed:
            self._mark_in_header(item)
            return
        text, brace, after = (item if isinstance(item, str) else item.text).partition("{")
        self._header.append(text)
        if brace:
            self._queue.appendleft(brace + after)
        if sum(map(len, self._header)) > MAX_ID_CHARS:
            self._write_header("expected an id, got prose")
        elif brace:
            self._begin_call()

    def _mark_in_header(self, marker: Marker) -> None:
        if marker.mark is Mark.ARGUMENT_BEGIN:
            self._begin_call()
        elif marker.mark is Mark.CALL_END:
            self._queue.appendleft(marker)
            self._begin_call()
        elif marker.mark in NEXT_AFTER_CALL:
            self._queue.appendleft(marker)
            self._abandon_header()

    def _begin_call(self) -> None:
        call_id = self._header_text().strip()
        name = self._names.resolve(call_id)
        if name is None and not self._names.is_nameless(call_id):
            self._write_header("expected the name of a tool")
            return
        self._header = None
        self._arguments = ArgumentReader()
        self._call = _Call(call_id, name)
        if name is not None:
            self._announce(self._call)

    def _abandon_header(self) -> None:
        """Another marker came where the arguments were due."""
        call_id = self._header_text().strip()
        name = self._names.resolve(call_id)
        if name is None:
            self._write_header("expected arguments")
        else:
            self._cut_short(call_id, name)

    def _finish_header(self) -> None:
        """The reply ended inside an id: the beginning of a call, unless it reads like prose."""
        call_id = self._header_text().strip()
        name = self._names.resolve(call_id)
        if name is None and len(call_id.split()) != 1:
            self._write_header("expected an id")
        else:
            self._cut_short(call_id, name or call_id.removeprefix("functions.").partition(":")[0])

    def _cut_short(self, call_id: str, name: str) -> None:
        self._header = None
        self._arguments = ArgumentReader()
        self._call = _Call(call_id, name)
        self._announce(self._call)
        self._end_call(Ending.CUT_SHORT)

    def _write_header(self, problem: str) -> None:
        """What followed a call's begin is no call of ours: it is text, and so is what comes next."""
        header, self._header = self._header_text(), None
        self._warn(f"tool call {header[:80]!r}: {problem}; kept as text")
        if header:
            self._text.write(header)

    def _header_text(self) -> str:
        return "".join(self._header or ())

    # -- the arguments of a call

    def _in_arguments(self, item: Item) -> None:
        if isinstance(item, Marker) and item.typed and self._arguments.in_string:
            item = item.text
        self._settle(self._arguments.take(item))

    def _settle(self, reading: Reading, is_last: bool = False) -> None:
        self._add_arguments(reading.arguments)
        self._queue.extendleft(reversed(reading.rest))
        if reading.ending is not None or is_last:
            self._end_call(reading.ending or Ending.CUT_SHORT)

    def _add_arguments(self, items: Sequence[Item]) -> None:
        call = self._call
        assert call is not None
        for item in items:
            text = item if isinstance(item, str) else item.text
            if text:
                call.pending.append(item)
            call.has_arguments = call.has_arguments or bool(text.strip())
        if call.name is not None and call.has_arguments and call.pending:
            self._emit("tool_call_arguments", _join(call.pending), call)
            call.pending.clear()

    def _end_call(self, ending: Ending) -> None:
        call, self._call = self._call, None
        assert call is not None
        if call.name is None and not self._find_name(call, ending):
            return
        if ending is Ending.COMPLETE:
            if not call.has_arguments:
                self._emit("tool_call_arguments", "{}", call)
            self._emit("tool_call_end", "", call)
        else:
            self._incomplete.append(call.index)
            self._warn(f"tool call {call.id!r}: cut short")
        self._text.meet_tools()

    def _find_name(self, call: _Call, ending: Ending) -> bool:
        """Tell the tool by the arguments, or keep the call as text."""
        arguments = _join(call.pending)
        call.name = self._names.match_arguments(arguments) if ending is Ending.COMPLETE else None
        if call.name is not None:
            self._announce(call)
            self._emit("tool_call_arguments", arguments, call)
            return True
        self._warn(f"tool call {call.id!r}: its arguments fit no tool, or several; kept as text")
        for text in (call.id, *(item for item in call.pending if isinstance(item, str))):
            if text:
                self._text.write(text)
        return False

    def _announce(self, call: _Call) -> None:
        self._text.end_reasoning()
        self._text.meet_tools()
        call.index = self._begun
        if self._call_ids is not None:
            call.id = self._call_ids.assign(call.id, call.name or "")
        else:
            call.id = call.id or f"functions.{call.name}:{call.index}"
        self._begun += 1
        self._emit("tool_call_begin", "", call)

    # -- events

    def _emit(self, kind: str, text: str, call: _Call | None = None) -> None:
        event = Event(kind, text, call.index, call.id, call.name) if call else Event(kind, text)
        self._events.append(event)

    def _warn(self, warning: str) -> None:
        self.warnings.append(warning)
        log.warning("%s", warning)


def _join(items: Iterable[Item]) -> str:
    return "".join(item if isinstance(item, str) else item.text for item in items)

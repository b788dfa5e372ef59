"""The arguments of one tool call: which markers in them are data, and where they end.

A marker inside a JSON string is data. It may also be the end of a call whose string was never closed, and then
taking it as data would swallow the calls that follow. So where what comes next looks like structure, the reader
holds everything back until the JSON text decides: when its value ends, the marker was data; when it breaks, the
marker was the end and what followed is parsed again. Two calls in a row cannot both be held over the same text
(their strings would have to open at the same places), so the time stays linear.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from hybrid_k2.protocol.json_scanner import JsonScanner, JsonState
from hybrid_k2.protocol.output_lexer import Item, Mark, Marker
from hybrid_k2.protocol.tool_names import MAX_ID_CHARS

# What may follow the end of a call, and what ends a call that lacks an end of its own.
NEXT_AFTER_CALL = frozenset({Mark.CALL_BEGIN, Mark.SECTION_BEGIN, Mark.SECTION_END, Mark.REPLY_END})


class Ending(Enum):
    """How a call ended."""

    COMPLETE = auto()
    CUT_SHORT = auto()


@dataclass
class Reading:
    """What one item settled: items that are arguments, perhaps the call's end, and items to parse after it."""

    arguments: list[Item] = field(default_factory=list)
    ending: Ending | None = None
    rest: list[Item] = field(default_factory=list)


class ArgumentReader:
    """Read the items of one call's arguments."""

    def __init__(self) -> None:
        self._json = JsonScanner()
        self._held: list[Item] = []  # from a marker that may be the call's end
        self._is_structure: bool | None = None  # does what follows that marker look like structure?
        self._id_chars = 0

    @property
    def in_string(self) -> bool:
        """Whether the next item lies inside a JSON string."""
        return self._json.state is JsonState.STRING

    def take(self, item: Item) -> Reading:
        """Read the next item."""
        if self._held:
            return self._take_held(item)
        if isinstance(item, str):
            self._json.scan(item)
            return Reading([item])
        if not self.in_string:
            return self._take_marker(item)
        if item.mark in (Mark.CALL_END, Mark.CALL_BEGIN):
            self._held, self._is_structure, self._id_chars = [item], None, 0
            return Reading()
        return Reading([item])

    def finish(self) -> Reading:
        """Decide about what is held, at the reply's end; the call stays open unless that ends it."""
        undecided_end = self._is_structure is None and self._held[:1] and self._held_mark() is Mark.CALL_END
        if self._held and (self._is_structure or undecided_end):
            return self._end_at_held()
        return self._release()

    def _take_marker(self, marker: Marker) -> Reading:
        """Read a marker outside any string."""
        if marker.mark is Mark.CALL_END:
            return Reading(ending=Ending.COMPLETE)
        if marker.mark in NEXT_AFTER_CALL:
            is_whole = self._json.state is JsonState.COMPLETE
            return Reading(ending=Ending.COMPLETE if is_whole else Ending.CUT_SHORT, rest=[marker])
        return Reading()

    def _take_held(self, item: Item) -> Reading:
        if self._is_structure is None:
            self._is_structure = self._judge(item)
        if self._is_structure is False:
            released = self._release()
            reading = self.take(item)
            return Reading(released.arguments + reading.arguments, reading.ending, reading.rest)
        self._held.append(item)
        is_broken = isinstance(item, Marker) and not self.in_string
        if isinstance(item, str):
            self._json.scan(item)
            is_broken = self._json.state is JsonState.BROKEN
        if self._json.state is JsonState.COMPLETE:
            return self._release()
        return self._end_at_held() if is_broken else Reading()

    def _judge(self, item: Item) -> bool | None:
        """Say whether an item right after the held marker looks like structure; None: the next one tells."""
        if self._held_mark() is Mark.CALL_END:
            if isinstance(item, str):
                return None if item.isspace() else False
            return item.mark in NEXT_AFTER_CALL
        if isinstance(item, Marker):
            return item.mark is Mark.ARGUMENT_BEGIN
        self._id_chars += len(item)
        is_id = self._id_chars <= MAX_ID_CHARS and not any(sign in item for sign in '"\\\n')
        return None if is_id else False

    def _held_mark(self) -> Mark:
        head = self._held[0]
        assert isinstance(head, Marker)
        return head.mark

    def _release(self) -> Reading:
        """What is held is arguments."""
        arguments, self._held = self._held, []
        return Reading(arguments)

    def _end_at_held(self) -> Reading:
        """What is held was the call's end and more."""
        held, self._held = self._held, []
        head = held[0]
        if isinstance(head, Marker) and head.mark is Mark.CALL_END:
            return Reading(ending=Ending.COMPLETE, rest=held[1:])
        return Reading(ending=Ending.CUT_SHORT, rest=held)

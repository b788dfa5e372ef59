"""The ids of tool calls: K2.6 reads and writes `functions.NAME:N`, N counting the calls of the conversation.

With ids of another form in its history, as clients and other servers make them, the model ends its turn without an
answer or copies the wrong form. So the history is rewritten before the model reads it, and each new call gets an id of
the model's form that the conversation does not have yet. Ids that are right already stay as they are, so that a
conversation led by this program, or by another that keeps the model's ids, keeps its cached prefix.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_OWN = re.compile(r"functions\.(.+):([0-9]{1,9})", re.DOTALL)
_COUNTED = re.compile(r"(?:functions\.)?(.+):[0-9]+", re.DOTALL)


@dataclass
class ToolIds:
    """The ids that a conversation has, and the number that its next call gets."""

    _taken: set[str] = field(default_factory=set)
    _next: int = 0

    def assign(self, written: str, name: str) -> str:
        """Return the id of the next call: as written if it is of the model's form and new, else one that is."""
        own = _OWN.fullmatch(written)
        if own is not None and own[1] == name and written not in self._taken:
            call_id, number = written, int(own[2])
        else:
            number = self._next
            while (call_id := f"functions.{name}:{number}") in self._taken:
                number += 1
        self._next = max(self._next, number) + 1
        self._taken.add(call_id)
        return call_id

    def keep(self, written: str) -> None:
        """Count a call whose id cannot be told in the model's form, or an id that only the client uses."""
        self._taken.add(written)

    def copy(self) -> ToolIds:
        """Return the ids for one reply: its calls do not count for another reply to the same conversation."""
        return ToolIds(set(self._taken), self._next)


def canonical_history(messages: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], ToolIds]:
    """Give the calls of a conversation ids of the model's form, and their results the same ones.

    A result without an id, or with one that no call has, belongs to the first call of the message before that has no
    result yet (of its `name`, if it states one). The request's messages are not changed; what is malformed beyond
    that stays as it is, for `read_messages` to judge.
    """
    ids, waiting = ToolIds(), _Waiting()
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        return messages, ids
    return [_rewrite(message, ids, waiting) for message in messages], ids


def _rewrite(message: Any, ids: ToolIds, waiting: _Waiting) -> Any:
    if not isinstance(message, Mapping):
        return message
    calls = message.get("tool_calls")
    if message.get("role") == "assistant" and isinstance(calls, (list, tuple)) and calls:
        waiting.begin_message()
        return {**message, "tool_calls": [_rewrite_call(call, ids, waiting) for call in calls]}
    return waiting.answer(message) if message.get("role") == "tool" else message


def _rewrite_call(call: object, ids: ToolIds, waiting: _Waiting) -> object:
    if not isinstance(call, Mapping):
        return call
    written, name = call.get("id"), _name_of(call)
    if name is None:
        if isinstance(written, str):
            ids.keep(written)
            waiting.add(written, "", written)
        return call
    call_id = ids.assign(written if isinstance(written, str) else "", name)
    if isinstance(written, str):
        ids.keep(written)
    waiting.add(written, name, call_id)
    return {**call, "id": call_id}


def _name_of(call: Mapping[str, Any]) -> str | None:
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if isinstance(name, str) and name:
        return name
    written = call.get("id")
    counted = _COUNTED.fullmatch(written) if isinstance(written, str) else None
    return counted[1] if counted else None


@dataclass
class _Call:
    name: str
    call_id: str
    answered: bool = False


class _Waiting:
    """The calls so far, by the ids that the client gave them; each result takes constant time, whatever the ids."""

    def __init__(self) -> None:
        self._of_client: dict[str, deque[_Call]] = {}
        self.begin_message()

    def begin_message(self) -> None:
        """Start the calls of a message, which are then the latest."""
        self._latest: deque[_Call] = deque()
        self._latest_of_name: dict[str, deque[_Call]] = {}
        self._seen: set[str] = set()  # ids of the client in this message

    def add(self, written: object, name: str, call_id: str) -> None:
        """Add a call of the latest message."""
        call = _Call(name, call_id)
        self._latest.append(call)
        self._latest_of_name.setdefault(name, deque()).append(call)
        if isinstance(written, str):
            if written not in self._seen:  # an id used again: results belong to the latest message that has it
                self._of_client[written] = deque()
                self._seen.add(written)
            self._of_client[written].append(call)

    def answer(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give a result the id of its call."""
        written, name = message.get("tool_call_id"), message.get("name")
        if written is not None and not isinstance(written, str):
            return message
        known = self._of_client.get(written or "")
        if known is not None:
            call = _first_open(known)
        else:
            call = _first_open(
                self._latest_of_name.get(name, deque()) if isinstance(name, str) and name else self._latest
            )
            if call is None or call.answered:
                return message
        assert call is not None  # a client's id has at least one call
        call.answered = True
        return {**message, "tool_call_id": call.call_id}


def _first_open(calls: deque[_Call]) -> _Call | None:
    """Return the first call that has no result; if all have one, the last; None for no calls."""
    while len(calls) > 1 and calls[0].answered:
        calls.popleft()
    return calls[0] if calls else None

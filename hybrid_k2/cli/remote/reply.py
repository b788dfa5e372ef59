"""From the frames of `/v1/chat/completions` to the events and the reply that an engine would give."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, get_args

from hybrid_k2.cli.chat.backend import OnPrefill
from hybrid_k2.cli.remote.server import EventStream
from hybrid_k2.engine.reply import FinishEvent, FinishReason, Reply, Timings, ToolCall, Usage
from hybrid_k2.errors import ServerError, shown
from hybrid_k2.protocol import Event

_REASONS = tuple(reason for reason in get_args(FinishReason) if reason != "cancelled")


class RemoteReply(Iterator[Event]):
    """Iterate over the events of one streamed reply; the last is a `FinishEvent`.

    `seed`: as the request stated it. An error, leaving early and `close` end the connection, and so the request.
    """

    def __init__(self, stream: EventStream, seed: int | None, on_prefill: OnPrefill) -> None:
        self._stream = stream
        self._seed = seed
        self._on_prefill = on_prefill
        self._parts = ReplyParts()
        self._cancelled = False
        self._events = self._read()

    def __next__(self) -> Event:
        return next(self._events)

    def cancel(self) -> None:
        """Hang up; what has come until now is the reply. Safe in a signal handler."""
        self._cancelled = True
        self._stream.shut()

    def close(self) -> None:
        """End the reply now, without further events."""
        self._events.close()
        self._stream.close()

    @property
    def reply(self) -> Reply:
        """The reply so far; its finish reason is "cancelled" unless it came to its end."""
        return self._parts.reply(self._seed)

    def _read(self) -> Generator[Event, None, None]:
        with closing(self._stream):
            try:
                for frame in self._stream:
                    try:
                        events = self._parts.take(frame)
                        progress = _progress(frame)
                    except _MalformedError as error:
                        raise ServerError(f"{self._stream.server.name}: {error}") from None
                    if progress:
                        self._on_prefill(*progress)
                    yield from events
                if self._parts.finish_reason is None:
                    raise ServerError(f"{self._stream.server.name}: expected a finish reason, got the end of the reply")
            except ServerError:
                if not self._cancelled:
                    raise
            yield FinishEvent(reply=self.reply)


class _MalformedError(Exception):
    """A frame is not as the API says."""


@dataclass
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)
    complete: bool = False


class ReplyParts:
    """Put a reply together from the frames of its stream."""

    def __init__(self) -> None:
        self.finish_reason: FinishReason | None = None
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []
        self._usage = Usage(0, 0, 0, 0)
        self._timings = Timings(0.0, 0.0, None, None, None)

    def take(self, frame: dict[str, Any]) -> list[Event]:
        """Take a frame and return its events. Raises: _MalformedError."""
        self._count_tokens(frame)
        if timings := _get(frame, "timings", dict):
            self._timings = _timings(timings)
        events: list[Event] = []
        for choice in _get(frame, "choices", list) or ():
            if not isinstance(choice, dict):
                raise _MalformedError(f"choices: expected objects, got {shown(choice)}")
            self._count_tokens(choice)
            events += self._increment(_get(choice, "delta", dict) or {})
            reason = choice.get("finish_reason")
            if reason is not None:
                if reason not in _REASONS:
                    raise _MalformedError(f"finish_reason: expected {', '.join(_REASONS)}, got {shown(reason)}")
                self.finish_reason = reason
                events += self._end_call()
        return events

    def reply(self, seed: int | None) -> Reply:
        """Return the reply so far. What only the server knows is null or empty: its tokens, a seed that it drew."""
        return Reply(
            content="".join(self._content),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(ToolCall(c.id, c.name, "".join(c.arguments)) for c in self._calls if c.complete),
            finish_reason=self.finish_reason or "cancelled",
            matched_stop=None,
            seed=seed,
            usage=self._usage,
            timings=self._timings,
            token_ids=(),
        )

    def _count_tokens(self, fields: dict[str, Any]) -> None:
        """Take the usage, which stands in the frame or, as with Moonshot's API, in the choice."""
        if usage := _get(fields, "usage", dict):
            self._usage = _usage(usage)

    def _increment(self, delta: dict[str, Any]) -> Iterator[Event]:
        reasoning = _get(delta, "reasoning_content", str)
        if reasoning:
            self._reasoning.append(reasoning)
            yield Event("reasoning", reasoning)
        content = _get(delta, "content", str)
        if content:
            yield from self._end_call()
            self._content.append(content)
            yield Event("content", content)
        for call in _get(delta, "tool_calls", list) or ():
            yield from self._call(call)

    def _call(self, delta: Any) -> Iterator[Event]:
        """Take more of a call: those of one reply come one after the other, the first part of each with its name."""
        function = _get(delta, "function", dict) if isinstance(delta, dict) else None
        if function is None:
            raise _MalformedError(f"tool_calls: expected an object with a function, got {shown(delta)}")
        name = _get(function, "name", str)
        if name:
            yield from self._end_call()
            self._calls.append(_Call(_get(delta, "id", str) or "", name))
            yield Event("tool_call_begin", index=len(self._calls) - 1, id=self._calls[-1].id, name=name)
        elif not self._calls or self._calls[-1].complete:
            raise _MalformedError(f"tool_calls: expected a name first, got {shown(delta)}")
        arguments = _get(function, "arguments", str)
        if arguments:
            self._calls[-1].arguments.append(arguments)
            yield self._call_event("tool_call_arguments", arguments)

    def _end_call(self) -> list[Event]:
        """End the call that was being written. The end of the reply may have cut it short: then it is no JSON."""
        if not self._calls or self._calls[-1].complete:
            return []
        call = self._calls[-1]
        if self.finish_reason in ("stop", "length") and not _is_object("".join(call.arguments)):
            return []
        call.complete = True
        return [self._call_event("tool_call_end")]

    def _call_event(self, kind: str, text: str = "") -> Event:
        call = self._calls[-1]
        return Event(kind, text, index=len(self._calls) - 1, id=call.id, name=call.name)


def _usage(fields: dict[str, Any]) -> Usage:
    return Usage(
        prompt_tokens=_count(fields, "prompt_tokens"),
        cached_tokens=_count(fields, "cached_tokens"),
        completion_tokens=_count(fields, "completion_tokens"),
        reasoning_tokens=_count(_get(fields, "completion_tokens_details", dict) or {}, "reasoning_tokens"),
    )


def _timings(fields: dict[str, Any]) -> Timings:
    return Timings(
        prefill_s=(_number(fields, "prompt_ms") or 0.0) / 1000,
        decode_s=(_number(fields, "predicted_ms") or 0.0) / 1000,
        prefill_tokens_per_s=_number(fields, "prompt_per_second"),
        decode_tokens_per_s=_number(fields, "predicted_per_second"),
        memory_share=None,
    )


def _progress(frame: dict[str, Any]) -> tuple[int, int] | None:
    """Return how many tokens of the prompt are read, and how many there are."""
    progress = _get(frame, "prompt_progress", dict)
    return None if progress is None else (_count(progress, "processed"), _count(progress, "total"))


def _get(fields: dict[str, Any], name: str, kind: type) -> Any:
    """Return a field that may be missing or null. Raises: _MalformedError: it is something else."""
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise _MalformedError(f"{name}: expected {kind.__name__} or null, got {shown(value)}")
    return value


def _count(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name) or 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _MalformedError(f"{name}: expected a count, got {shown(value)}")
    return value


def _number(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise _MalformedError(f"{name}: expected a number, got {shown(value)}")
    return value


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False

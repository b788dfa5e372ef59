"""What ran when: the accelerator, the experts and the copies on one time line.

Times are those of CLOCK_MONOTONIC in ns (`time.monotonic_ns`, and `steady_clock` of the native code).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_k2.errors import ConfigError, EngineError
from hybrid_k2.files import check_writable

if TYPE_CHECKING:
    from hybrid_k2.accelerator.base import Label

LANES = ("accelerator", "experts", "copies")
WAITS = "waits"  # shown inside the accelerator's lane: the time in which it did nothing but wait for the experts

Span = tuple[int, int]


@dataclass(frozen=True)
class Event:
    """One operation: what, and from when to when. Units: ns."""

    label: Label
    start_ns: int
    stop_ns: int


class Trace:
    """Collect the times of operations; threads may add to it at once."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, label: Label, start_ns: int, stop_ns: int) -> None:
        """Add an operation."""
        self.events.append(Event(label, start_ns, stop_ns))

    def busy(self, lane: str) -> list[Span]:
        """Return the spans in which a lane worked, merged and ascending; waiting is not work."""
        spans = _union(self._spans(lane))
        return list(_without(spans, _union(self._spans(WAITS)))) if lane == LANES[0] else spans

    def overlap_share(self) -> float | None:
        """Return the part of the experts' busy time in which the accelerator was busy too; None if they never were."""
        experts = self.busy("experts")
        total = _length(experts)
        if total == 0:
            return None
        return _length(_intersection(experts, self.busy("accelerator"))) / total

    def write(self, path: Path) -> None:
        """Write the trace in the JSON format that Chrome (about:tracing) and Perfetto show. Raises: EngineError."""
        try:
            path.write_text(_text(self))
        except OSError as error:
            raise EngineError(f"{path}: expected to write the trace, got {error.strerror}") from error

    def as_json(self) -> dict[str, Any]:
        """Return the trace as the JSON object that `write` writes. Units: us from the first event on."""
        events = list(self.events)
        first = min((event.start_ns for event in events), default=0)
        lanes = [*LANES, *sorted({event.label.lane for event in events} - {*LANES, WAITS})]
        threads = {lane: number for number, lane in enumerate(lanes)} | {WAITS: 0}
        named = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": threads[lane], "args": {"name": lane}} for lane in lanes
        ]
        return {"traceEvents": named + [_as_json(event, first, threads[event.label.lane]) for event in events]}

    def _spans(self, lane: str) -> Iterator[Span]:
        return ((event.start_ns, event.stop_ns) for event in list(self.events) if event.label.lane == lane)


def check_trace_file(path: str | Path) -> Path:
    """Make sure that a trace can be written there, before there is one (`files.check_writable`).

    Raises: ConfigError.
    """
    if not str(path).strip():
        raise ConfigError(f"trace: expected the name of a file, got {str(path)!r}")
    return check_writable(path, "trace", _text(Trace()).removesuffix("]}").encode())


def _text(trace: Trace) -> str:
    return json.dumps(trace.as_json(), separators=(",", ":"))


def _as_json(event: Event, first_ns: int, thread: int) -> dict[str, Any]:
    label = event.label
    args = {key: value for key, value in (("layer", label.layer), ("half", label.half)) if value is not None}
    return {
        "ph": "X",
        "name": label.name,
        "cat": label.lane,
        "pid": 0,
        "tid": thread,
        "ts": (event.start_ns - first_ns) / 1e3,
        "dur": (event.stop_ns - event.start_ns) / 1e3,
        "args": args,
    }


def _union(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif stop > start:
            merged.append((start, stop))
    return merged


def _intersection(first: list[Span], second: list[Span]) -> Iterator[Span]:
    """Of merged, ascending spans."""
    i = j = 0
    while i < len(first) and j < len(second):
        start, stop = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < stop:
            yield start, stop
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1


def _without(spans: list[Span], holes: list[Span]) -> Iterator[Span]:
    """Of merged, ascending spans."""
    edges = [0, *(edge for hole in holes for edge in hole), max((stop for _, stop in spans), default=0)]
    between = [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
    return _intersection(spans, between)


def _length(spans: Iterable[Span]) -> int:
    return sum(stop - start for start, stop in spans)

"""The time line: lanes, the share of overlap, the JSON that trace viewers read."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from hybrid_k2.accelerator import Label, Trace, check_trace_file
from hybrid_k2.errors import ConfigError


def add(trace: Trace, lane: str, *spans: tuple[int, int]) -> None:
    for start, stop in spans:
        trace.add(Label(f"{lane} work", layer=1, lane=lane), start, stop)


def test_the_share_is_of_the_experts_time() -> None:
    trace = Trace()
    assert trace.overlap_share() is None
    add(trace, "accelerator", (0, 60))
    assert trace.overlap_share() is None
    add(trace, "experts", (50, 90), (100, 110))
    assert trace.overlap_share() == 10 / 50


def test_waiting_is_not_work() -> None:
    trace = Trace()
    add(trace, "accelerator", (0, 100))
    add(trace, "experts", (0, 100))
    assert trace.overlap_share() == 1
    add(trace, "waits", (30, 80))
    assert trace.busy("accelerator") == [(0, 30), (80, 100)]
    assert trace.overlap_share() == 0.5


def test_the_share_equals_counting_ticks() -> None:
    rng = random.Random()
    for _ in range(200):
        trace = Trace()
        ticks: dict[str, set[int]] = {"accelerator": set(), "experts": set(), "waits": set(), "copies": set()}
        for _ in range(rng.randrange(1, 25)):
            lane = rng.choice(list(ticks))
            start = rng.randrange(50)
            stop = start + rng.randrange(12)
            add(trace, lane, (start, stop))
            ticks[lane] |= set(range(start, stop))
        both = ticks["experts"] & (ticks["accelerator"] - ticks["waits"])
        share = trace.overlap_share()
        assert share == (len(both) / len(ticks["experts"]) if ticks["experts"] else None)


def test_the_file_shows_each_event_on_the_thread_of_its_lane(tmp_path: Path) -> None:
    trace = Trace()
    trace.add(Label("front", layer=3, half=1), 5_000, 9_500)
    trace.add(Label("wait", layer=3, lane="waits"), 6_000, 7_000)
    trace.add(Label("experts", layer=3, half=1, lane="experts"), 5_500, 8_000)
    trace.add(Label("odd", lane="another"), 5_500, 8_000)
    file = tmp_path / "trace.json"
    trace.write(file)
    events = json.loads(file.read_text())["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(threads.values()) == ["accelerator", "experts", "copies", "another"]
    front, wait, experts, odd = [event for event in events if event["ph"] == "X"]
    assert (front["ts"], front["dur"], front["args"]) == (0, 4.5, {"layer": 3, "half": 1})
    assert [threads[event["tid"]] for event in (front, wait, experts, odd)] == [
        "accelerator",
        "accelerator",
        "experts",
        "another",
    ]
    assert odd["args"] == {}


@pytest.mark.parametrize(
    ("label", "text"),
    [(Label("front", 3, 1), "front, layer 3, half 1"), (Label("head"), "head"), (Label("take", 0), "take, layer 0")],
)
def test_a_label_reads_well(label: Label, text: str) -> None:
    assert str(label) == text


def test_looking_whether_it_can_be_written_leaves_no_file_and_changes_none(tmp_path: Path) -> None:
    new, empty, old, link = (tmp_path / name for name in ("new.json", "empty", "old.json", "link"))
    link.symlink_to(new)
    empty.touch()
    trace = Trace()
    trace.add(Label("front", layer=3, half=1), 5_000, 9_500)
    trace.add(Label("odd", lane="another"), 5_500, 8_000)
    trace.write(old)
    written = old.read_bytes()
    for path in (new, empty, old, link):
        assert check_trace_file(path) == check_trace_file(str(path)) == path
    assert not new.exists()
    assert link.is_symlink()
    assert (empty.read_bytes(), old.read_bytes()) == (b"", written)


@pytest.mark.parametrize("content", ["kept", "{}", '{"traceEvents":[]}', " "])
def test_a_file_that_is_no_trace_is_not_replaced(content: str, tmp_path: Path) -> None:
    other = tmp_path / "notes"
    other.write_text(content)
    with pytest.raises(
        ConfigError, match="notes: expected a trace, an empty file or none, got a file that holds"
    ) as error:
        check_trace_file(other)
    assert "another file" in (error.value.hint or "")
    assert other.read_text() == content


def test_what_is_no_regular_file_is_refused_unopened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="expected a trace file that can be written, got a device, pipe or socket"):
        check_trace_file(pipe)  # to open it would wait for a reader
    with pytest.raises(ConfigError, match="expected a trace file that can be written, got a folder"):
        check_trace_file(tmp_path)
    for name in ("null\0byte", "long" * 100):
        with pytest.raises(ConfigError, match="expected a trace file that can be written, got"):
            check_trace_file(tmp_path / name)
    for name in ("", " "):
        with pytest.raises(ConfigError, match="trace: expected the name of a file, got"):
            check_trace_file(name)

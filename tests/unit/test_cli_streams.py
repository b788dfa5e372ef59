"""A stdout that cannot be written ends the command with one error; a stderr that cannot be written does not."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from hybrid_k2.cli.streams import OutputError, own_streams

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@pytest.fixture
def full() -> Iterator[TextIO]:
    with FULL.open("w") as file:
        yield file


@pytest.fixture
def unread() -> Iterator[TextIO]:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        yield file


@needs_full
@pytest.mark.parametrize("length", [1, 8191, 8193, 100_000])
def test_a_full_stdout(monkeypatch: pytest.MonkeyPatch, full: TextIO, length: int) -> None:
    monkeypatch.setattr(sys, "stdout", full)
    with own_streams():
        with pytest.raises(OutputError, match=f"standard output: cannot be written: {os.strerror(errno.ENOSPC)}") as e:
            print("x" * length, flush=True)
        print("this and what is left goes nowhere", flush=True)
    assert not e.value.reader_left
    assert sys.stdout is full


@needs_full
@pytest.mark.parametrize("length", [1, 100_000])
def test_a_full_stderr_loses_only_what_goes_there(monkeypatch: pytest.MonkeyPatch, full: TextIO, length: int) -> None:
    monkeypatch.setattr(sys, "stderr", full)
    with own_streams():
        print("x" * length, file=sys.stderr, flush=True)
    assert sys.stderr is full


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_pipe_without_a_reader(monkeypatch: pytest.MonkeyPatch, unread: TextIO, name: str) -> None:
    monkeypatch.setattr(sys, name, unread)
    with own_streams(), pytest.raises(OutputError) as e:
        print("hello", file=getattr(sys, name), flush=True)
    assert e.value.reader_left


def test_an_error_of_another_file_is_left_alone() -> None:
    with own_streams(), pytest.raises(FileNotFoundError):
        Path("/no/such/file").read_text()

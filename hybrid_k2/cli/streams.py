"""Stdout and stderr as a command finds them: closed, full, without a reader, or short of characters."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

STDERR = 2


class OutputError(Exception):
    """What the command has to say cannot be said. It is no error of one message: a chat does not go on after it.

    reader_left: whether the other end of a pipe was closed, which is no fault.
    """

    def __init__(self, message: str, *, reader_left: bool = False) -> None:
        super().__init__(message)
        self.reader_left = reader_left


@contextmanager
def own_streams() -> Iterator[None]:
    """Let stdout fail with an `OutputError` inside the block, and stderr not at all unless its reader has left.

    Effects: replaces sys.stdout and sys.stderr, and puts them back, but for a closed stderr, which becomes the null
    device. A stream that has failed stays silent, so that Python's flush at exit does not fail again.
    Raises: OutputError: also if stdout is closed from the start.
    """
    if sys.stderr is None:
        sys.stderr = _null_stderr()
    if sys.stdout is None:
        raise OutputError("standard output: expected an open stream, got a closed one")
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # rather than fail in the middle of a reply
    sys.stdout = cast(TextIO, _Guarded(sys.stdout, "standard output", needed=True))
    sys.stderr = cast(TextIO, _Guarded(sys.stderr, "standard error", needed=False))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Guarded:
    """A text file whose failures are told apart from those of every other file."""

    def __init__(self, file: TextIO, name: str, *, needed: bool) -> None:
        self._file = file
        self._name = name
        self._needed = needed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._file.fileno())
        os.close(null)
        reader_left = error.errno == errno.EPIPE
        if self._needed or reader_left:
            raise OutputError(f"{self._name}: cannot be written: {error.strerror}", reader_left=reader_left) from error


def _null_stderr() -> TextIO:
    """Open the null device as stderr, and under its number, which else the next file gets: perhaps a saved chat."""
    try:
        os.fstat(STDERR)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != STDERR:
            os.dup2(null, STDERR)
            os.close(null)
        return open(STDERR, "w", encoding="utf-8", errors="replace", closefd=False)
    return open(os.devnull, "w", encoding="utf-8", errors="replace")

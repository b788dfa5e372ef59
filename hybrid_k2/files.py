"""Files by their names: reading one whole, JSON without surprises, and what may be replaced by one of our own."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from hybrid_k2.errors import ConfigError, HybridK2Error, shown

MAX_BYTES = 100_000_000  # many times the largest file of K2.6 that is read whole; the index has a limit of its own
LFS_POINTER = b"version https://git-lfs"  # a repository cloned without its large files has text files in their place
LFS_HINT = "the large files were not downloaded: run `git lfs pull` in the checkpoint folder"
MAX_DIGITS = 1000  # of an integer in JSON; far beyond any use, and well inside what Python reads and writes


def read_file(path: Path, error_class: type[HybridK2Error], max_bytes: int = MAX_BYTES) -> bytes:
    """Read a whole file. Raises: `error_class` when there is none, or it is no regular file, too large or unreadable.

    A pipe or a device is refused unopened: reading it might wait forever.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error_class(f"{path}: expected a file, got {kind_of(status.st_mode)}")
        if status.st_size > max_bytes:
            raise error_class(f"{path}: expected at most {max_bytes} bytes, got {status.st_size}")
        data = path.read_bytes()
    except FileNotFoundError:
        found = "a link to a file that does not exist" if os.path.lexists(path) else "no such file"
        raise error_class(f"{path}: expected a file, got {found}") from None
    except OSError as error:
        raise error_class(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith(LFS_POINTER):
        raise error_class(f"{path}: expected the file itself, got a Git LFS pointer", hint=LFS_HINT)
    return data


def check_writable(path: str | Path, kind: str, start: bytes) -> Path:
    """Make sure that a file can be written there, before there is one, and leave no new file behind.

    Of what is there already, only a file of this `kind`, which begins with `start`, may be replaced, or an empty one; a
    file that ends within `start` was cut.
    Raises: ConfigError.
    """
    try:
        target = Path(os.path.realpath(path))  # a link may lead to a file that is not there yet
        new = not target.exists()
        if not new:
            _check_replaceable(path, target, kind, start)
        target.open("a").close()
        if new:
            target.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: expected a {kind} file that can be written, got {reason}") from error
    return Path(path)


def _check_replaceable(path: str | Path, target: Path, kind: str, start: bytes) -> None:
    mode = target.stat().st_mode
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its reader
        raise ConfigError(f"{path}: expected a {kind} file that can be written, got {kind_of(mode)}")
    with target.open("rb") as file:
        if not start.startswith(file.read(len(start))):
            raise ConfigError(
                f"{path}: expected a {kind}, an empty file or none, got a file that holds something else",
                hint="name another file; this one stays as it is",
            )


def parse_json_object(text: bytes, place: str, error_class: type[HybridK2Error]) -> dict[str, Any]:
    """Parse a JSON object without repeated keys. Raises: `error_class` naming `place`."""
    try:
        data = json.loads(
            text.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_none,
        )
    except (ValueError, RecursionError) as error:
        raise error_class(f"{place}: expected valid JSON, got: {error}") from None
    if not isinstance(data, dict):
        raise error_class(f"{place}: expected a JSON object, got {type(data).__name__}")
    return data


def kind_of(mode: int) -> str:
    """Name in an error what is no regular file."""
    return "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {shown(name)} twice")
    return data


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"a number beyond the range of float64, {shown(text)}")
    return number


def _none(text: str) -> float:
    raise ValueError(f"{text}, which is no JSON")

"""Read and write the files that a user names: whatever such a path leads to, the worst is one `ConfigError`."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from hybrid_k2.errors import ConfigError

MAX_BYTES = 64 * 2**20
MAX_DIGITS = 640  # the longest integer that no setting of Python refuses to read or print
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def path_of(argument: str) -> Path:
    """Return the path that was typed behind a command: quotes around it are taken off, `~` is the home folder.

    Raises: ConfigError: it is empty or cannot be a path.
    """
    text = argument.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if not text.strip() or "\0" in text:
        raise ConfigError(f"file name: expected one, got {text!r}")
    return Path(os.path.expanduser(text))


def path_completions(typed: str) -> list[str]:
    """Return the paths that go on as typed, folders with a slash behind them; hidden ones only behind a typed dot."""
    folder, name = os.path.split(typed)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            found = [
                os.path.join(folder, entry.name) + "/" * entry.is_dir()
                for entry in entries
                if entry.name.startswith(name) and (name or not entry.name.startswith("."))
            ]
    except (OSError, ValueError):
        return []
    return sorted(found)


def read_json(path: Path, most: int = MAX_BYTES) -> Any:
    """Return the JSON value of a regular file.

    Raises: ConfigError: it cannot be read, is over `most` bytes, or is not JSON in UTF-8.
    """
    text = _read_text(path, most)
    try:
        data = json.loads(text, parse_int=_integer)
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair; nothing can read it
        raise ConfigError(
            f"{path}: expected Unicode text, got the lone surrogate {error.object[error.start]!r}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from error
    return data


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """Return what is in a regular file. Raises: ConfigError: it cannot be read, or is over `most` bytes."""
    try:
        _require_regular(path)  # before it is opened: a named pipe would wait for a writer, a device might act
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {_reason(error)}") from error
    if len(data) > most:
        raise ConfigError(f"{path}: expected at most {most // 2**20} MiB, got more")
    return data


def target_of(path: Path) -> Path:
    """Return where a file would be written: links are followed.

    Raises: ConfigError: what is there is no regular file, or cannot be looked at.
    """
    try:
        if _exists(path):
            _require_regular(path)
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {_reason(error)}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file that only the user can read.

    Effects: the file appears whole or not at all; one that was there is replaced.
    Raises: ConfigError: it cannot be written.
    """
    target = target_of(path)
    try:
        # Its name owes nothing to the target's, which may be as long as a name can be.
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".hybrid-k2-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {_reason(error)}") from error


def _read_text(path: Path, most: int) -> str:
    data = read_bytes(path, most)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, got byte 0x{data[error.start]:02x}") from error


def _exists(path: Path) -> bool:
    """Say whether there is something; other than `Path.exists`, fail where that cannot be told."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _require_regular(path: Path) -> None:
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise ConfigError(f"{path}: expected a regular file, got {_KINDS.get(kind, 'something else')}")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"expected integers of at most {MAX_DIGITS} digits, got one of {len(digits)}")
    return int(digits)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)

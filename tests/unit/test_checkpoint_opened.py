"""An open file of a checkpoint: ranges are read whole or refused, and a change of the file is noticed."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_k2.checkpoint.opened import OpenedFile
from hybrid_k2.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(5000))
    return path


def test_a_range_is_read_whole(path: Path) -> None:
    file = OpenedFile.open(path, "the index")
    memory = bytearray(321)
    file.read_into(memoryview(memory), 1234, "t")
    assert memory == path.read_bytes()[1234 : 1234 + 321]
    file.check_unchanged("t")
    file.close()


def replace(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes())
    os.utime(path.parent / "new", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(path.parent / "new", path)


def write_in_place(path: Path) -> None:
    stamp = path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(stamp, stamp))  # as copying programs do


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "written to": (write_in_place, "got one that was changed"),
    "longer": (lambda path: os.truncate(path, 5001), "got 5001 bytes instead of 5000"),
    "shorter": (lambda path: os.truncate(path, 4999), "got 4999 bytes instead of 5000"),
    "replaced": (replace, "got another file of that name"),
    "removed": (lambda path: path.unlink(), "expected a file that stays until it is loaded: No such file"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(path: Path, change: str) -> None:
    action, message = CHANGES[change]
    file = OpenedFile.open(path, "the index")
    file.check_unchanged("t")
    action(path)
    with pytest.raises(CheckpointError, match=message) as error:
        file.check_unchanged("layer.weight")
    assert error.value.message.startswith("layer.weight: ")
    assert error.value.message.endswith(f"(in {path})")
    file.close()


def test_being_read_is_no_change(path: Path) -> None:
    file = OpenedFile.open(path, "the index")
    path.read_bytes()
    with open(path, "rb") as reader, mmap.mmap(reader.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert mapping[4999:] == path.read_bytes()[4999:]
    file.check_unchanged("t")
    file.close()


def test_a_closed_file(path: Path) -> None:
    file = OpenedFile.open(path, "the index")
    file.close()
    file.close()
    with pytest.raises(CheckpointError, match="t: expected an open checkpoint, got a closed one"):
        file.read_into(memoryview(bytearray(1)), 0, "t")


def test_a_short_file_is_refused(path: Path) -> None:
    file = OpenedFile.open(path, "the index")
    with pytest.raises(CheckpointError, match=r"^t: expected 10 bytes, got 7 \(in .*model\.safetensors\)$"):
        file.read_into(memoryview(bytearray(10)), 4993, "t")
    file.close()

"""Whatever a path leads to, reading and writing end in one `ConfigError` or in the file."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from hybrid_k2.cli.chat.files import MAX_BYTES, MAX_DIGITS, path_of, read_json, target_of, write_whole
from hybrid_k2.errors import ConfigError


def test_a_typed_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of(" a b.json ") == Path("a b.json")
    assert path_of('"~/a.json"') == tmp_path / "a.json"
    assert path_of("'") == Path("'")
    for nothing in ("", '""', "' '", "a\0b"):
        with pytest.raises(ConfigError, match="file name: expected one"):
            path_of(nothing)


@pytest.mark.parametrize("digits", [MAX_DIGITS, MAX_DIGITS + 1, 5000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_integers_are_read_up_to_a_length(tmp_path: Path, digits: int, sign: str) -> None:
    path, number = tmp_path / "n.json", sign + "7" * (digits - len(sign))
    path.write_text(f'[{{"n": {number}}}]')
    if digits <= MAX_DIGITS:
        assert read_json(path) == [{"n": int(number)}]
        return
    with pytest.raises(ConfigError, match=f"n.json: expected JSON: .*at most {MAX_DIGITS} digits, got one of {digits}"):
        read_json(path)


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_bytes(b"[]")
    os.truncate(path, MAX_BYTES + 1)  # a hole: it takes no room on the disk
    with pytest.raises(ConfigError, match=r"large\.json: expected at most 64 MiB"):
        read_json(path)


@pytest.fixture(params=["folder", "pipe", "socket", "device", "link"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """What is there and is no file, and what it is called."""
    path = tmp_path / request.param
    if request.param == "folder":
        path.mkdir()
        return path, "a folder"
    if request.param == "pipe":
        os.mkfifo(path)
        return path, "a named pipe"
    if request.param == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
        return path, "a socket"
    if request.param == "link":
        path.symlink_to("/dev/null")
        return path, "a device"
    return Path("/dev/zero"), "a device"


def test_only_regular_files_are_read_and_replaced(special: tuple[Path, str]) -> None:
    path, kind = special
    before = path.lstat()
    for act in (read_json, target_of, lambda path: write_whole(path, "text")):
        with pytest.raises(ConfigError, match=f"{path}: expected a regular file, got {kind}"):
            act(path)
    assert path.lstat() == before


def test_a_loop_of_links(tmp_path: Path) -> None:
    path = tmp_path / "loop"
    path.symlink_to(path)
    for act in (read_json, target_of, lambda path: write_whole(path, "text")):
        with pytest.raises(ConfigError, match="symbolic links"):
            act(path)
    assert path.is_symlink()


def test_the_longest_name_there_is(tmp_path: Path) -> None:
    longest = tmp_path / ("n" * 255)
    write_whole(longest, "text")
    assert longest.read_text() == "text"
    assert list(tmp_path.iterdir()) == [longest]
    for act in (read_json, target_of, lambda path: write_whole(path, "text")):
        with pytest.raises(ConfigError, match="File name too long"):
            act(tmp_path / ("n" * 256))


def test_what_cannot_be_a_path() -> None:
    for act in (read_json, target_of, lambda path: write_whole(path, "text")):
        with pytest.raises(ConfigError, match=r"cannot be (read|written): .*null"):
            act(Path("a\0b"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    for act in (read_json, target_of, lambda path: write_whole(path, "text")):
        with pytest.raises(ConfigError, match="Permission denied"):
            act(tmp_path / "closed" / "c.json")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_that_takes_no_files() -> None:
    with pytest.raises(ConfigError, match=r"/proc/self/c\.json: cannot be written: "):
        write_whole(Path("/proc/self/c.json"), "text")

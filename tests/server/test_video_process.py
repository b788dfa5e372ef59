"""Videos in a process of its own: the same clips and errors as here, and whatever a decoder does ends there."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid_k2.errors import RequestError
from hybrid_k2.protocol import ImageFormat, read_video
from hybrid_k2.server import video_process
from hybrid_k2.server.video_process import check_video_apart, read_video_apart
from tests.videos import coloured, video

K26 = ImageFormat()
PLACE = "messages[0].content[0].video_url.url"


def refused(data: bytes, **more: Any) -> str:
    with pytest.raises(RequestError) as error:
        read_video_apart(data, K26, PLACE, 1000, **more)
    assert str(error.value).startswith(f"{PLACE}: expected ")
    return str(error.value)


def bomb(samples: int) -> bytes:
    """Write a file of some kilobytes that says it has so many frames of a byte each; FFmpeg makes an index of them."""
    data = bytearray(video(coloured(30)))
    for atom, offset, values in ((b"stsz", 4, (1, samples)), (b"stsc", 12, (samples,)), (b"stts", 8, (samples,))):
        at = data.index(atom) + 4 + offset
        data[at : at + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    return bytes(data)


@pytest.mark.parametrize("format", [K26, ImageFormat(mean=(0.1, 0.2, 0.3), frame_rate=7.5, clip_frames=3)])
@pytest.mark.parametrize("most", [13, 1000])
def test_the_clips_are_those_of_this_process(format: ImageFormat, most: int) -> None:
    data = video(coloured(75), rate=25)
    here, apart = read_video(data, format, PLACE, most), read_video_apart(data, format, PLACE, most)
    assert [clip.seconds for clip in apart.clips] == [clip.seconds for clip in here.clips]
    assert [clip.image.digest for clip in apart.clips] == [clip.image.digest for clip in here.clips]
    assert all(np.array_equal(a.image.pixels, b.image.pixels) for a, b in zip(apart.clips, here.clips, strict=True))
    assert apart.clips[0].image.format == format
    with pytest.raises(ValueError, match="read-only"):
        apart.clips[0].image.pixels[0, 0, 0, 0] = 1


def test_the_errors_are_those_of_this_process() -> None:
    with pytest.raises(RequestError) as here:
        read_video(b"no video", K26, PLACE)
    assert refused(b"no video") == str(here.value)
    with pytest.raises(RequestError, match="file: expected an MP4") as checked:
        check_video_apart(b"no video", "file")
    assert checked.value.hint == here.value.hint
    check_video_apart(video(coloured(3)), "file")


def test_no_module_comes_from_the_folder_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("selectors.py", "hybrid_k2.py"):
        (tmp_path / name).write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    check_video_apart(video(coloured(3)), "file")


def test_memory_is_bounded_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index would take 24 bytes for each frame; FFmpeg goes on without one where there is no room for it."""
    monkeypatch.setattr(video_process, "MEMORY_BYTES", 1 << 30)
    assert "a video with frames, got none" in refused(bomb(60_000_000))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    processes = []
    popen = subprocess.Popen

    def start(*args: Any, **more: Any) -> Any:
        processes.append(popen(*args, **more))
        return processes[-1]

    monkeypatch.setattr(video_process.subprocess, "Popen", start)
    return processes


@pytest.mark.parametrize("code", ["import os; os.kill(os.getpid(), 11)", "raise MemoryError", "print('x' * 3)"])
def test_a_decoder_that_crashes(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_process, "_COMMAND", [sys.executable, "-c", code])
    assert "got one that ended its decoder" in refused(b"x" * 10**6)


@pytest.mark.parametrize("first", ["sys.stdin.buffer.read()", "None"])
def test_a_decoder_that_hangs(
    first: str, monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]
) -> None:
    hangs = f"import sys, time; {first}; time.sleep(1000)"
    monkeypatch.setattr(video_process, "_COMMAND", [sys.executable, "-c", hangs])
    monkeypatch.setattr(video_process, "START_S", 0.0)
    monkeypatch.setattr(video_process, "MAX_SECONDS", 0.0)
    assert "a video that is read in 0 s" in refused(b"x" * 10**6)  # more than a pipe holds
    assert started[0].returncode is not None, "it has ended, too"


def test_a_client_that_goes(monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]) -> None:
    hangs = "import sys, time; sys.stdin.buffer.read(); time.sleep(1000)"
    monkeypatch.setattr(video_process, "_COMMAND", [sys.executable, "-c", hangs])
    gone = threading.Event()
    gone.set()
    assert "somebody who waits" in refused(b"x", stopped=gone.is_set)
    assert started[0].returncode is not None

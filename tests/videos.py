"""Video files for tests, written with PyAV: each frame in a colour of its own, so that a frame is known by it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

av: Any = pytest.importorskip("av", "17.1", reason="PyAV reads and writes the videos: pip install av pillow")
pytest.importorskip("PIL", reason="Pillow scales the frames: pip install pillow")

Pixels = NDArray[np.uint8]
LEVELS = (20, 70, 120, 170, 220)  # of red, green and blue: far enough apart for any codec


def colour(index: int) -> Pixels:
    """Return the colour of a frame: 125 of them, then from the beginning."""
    digits = (index % 5, index // 5 % 5, index // 25 % 5)
    return np.array([LEVELS[digit] for digit in digits], np.uint8)


def coloured(count: int, width: int = 64, height: int = 48) -> list[Pixels]:
    """Return frames [height, width, 3] of one colour each."""
    return [np.broadcast_to(colour(index), (height, width, 3)) for index in range(count)]


def index_of(pixels: Pixels) -> int:
    """Return the number of the coloured frame that a decoded one shows."""
    middle = pixels[8:-8, 8:-8].reshape(-1, 3).mean(0)
    digits = [int(np.abs(np.array(LEVELS) - value).argmin()) for value in middle]
    nearest = np.array([LEVELS[digit] for digit in digits])
    assert np.abs(nearest - middle).max() < 20, "no colour of a frame"
    return digits[0] + 5 * digits[1] + 25 * digits[2]


def video(
    frames: Sequence[Pixels],
    kind: str = "mp4",
    codec: str = "mpeg4",
    rate: int | Fraction = 30,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """Write a video. `times`: when the frames are shown, in units of 1 / rate; without, one after the other."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as out:
        stream = out.add_stream(codec, rate=rate, options={"g": "12"} | (options or {}))
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.bit_rate = 4_000_000  # colours stay what they are
        stream.codec_context.thread_count = 1
        stream.time_base = stream.codec_context.time_base = 1 / Fraction(rate)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            frame.pts = times[index] if times else index
            frame.time_base = 1 / Fraction(rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()

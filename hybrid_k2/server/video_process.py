"""Videos of clients, decoded in a process of its own: a decoder that crashes, or takes memory without end, ends alone.

The process gets a line of JSON and the file on its standard input. It answers with messages: the length of a JSON
object, the object, and for a clip its pixels. It has bounded memory, and is ended when its answer is there, or no
longer wanted.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hybrid_k2
from hybrid_k2.errors import HybridK2Error, RequestError
from hybrid_k2.protocol import Clip, Image, ImageFormat, Video, check_video, read_video
from hybrid_k2.protocol.video_files import MAX_SECONDS

MEMORY_BYTES = 2 << 30  # of addresses: libraries, and what a decoder holds; beside the file and the pixels it gives
TOKEN_BYTES = 4 * 28 * 28 * 3  # pixels of a token: four frames of K2.6's size
START_S = 30.0  # beside the time to decode: a busy machine takes its time to import
_COMMAND = [sys.executable, "-m", "hybrid_k2.server.video_process"]
_LENGTH = struct.Struct("<I")


def read_video_apart(
    data: bytes, format: ImageFormat, place: str, most: int, stopped: Callable[[], bool] = lambda: False
) -> Video:
    """Decode a video file as `read_video` does. Raises: RequestError naming `place`."""
    import numpy as np

    clips = []
    room = 2 * (most + format.max_frame_tokens) * TOKEN_BYTES  # frames, and the clips that they become
    request = {"place": place, "format": asdict(format), "most": most}
    with _answer(request, data, room, stopped) as read:
        while not (message := _message(read, place)).get("end"):
            shape = tuple(message["shape"])
            pixels = np.frombuffer(read(int(np.prod(shape))), np.uint8).reshape(shape)
            clips.append(Clip(message["seconds"], Image(pixels, format)))
    return Video(tuple(clips))


def check_video_apart(data: bytes, place: str) -> None:
    """Look through a video file as `check_video` does. Raises: RequestError naming `place`, where it is none."""
    with _answer({"place": place, "format": None, "most": 0}, data, 0, lambda: False) as read:
        _message(read, place)


@contextmanager
def _answer(
    request: Mapping[str, Any], data: bytes, room: int, stopped: Callable[[], bool]
) -> Iterator[Callable[[int], bytes]]:
    """Start the process, and yield what reads so many bytes of its answer; it has ended afterwards."""
    head = json.dumps({**request, "memory": MEMORY_BYTES + 2 * len(data) + room}).encode() + b"\n"
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # numpy reserves memory for each
    with (
        subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | one_thread,
            cwd=Path(hybrid_k2.__file__).parents[1],  # where Python looks for modules first: not in the server's folder
            start_new_session=True,  # Ctrl-C is for the server
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        output = process.stdout.fileno()
        selector.register(output, selectors.EVENT_READ)
        deadline = time.monotonic() + START_S + MAX_SECONDS
        late = threading.Timer(START_S + MAX_SECONDS, process.kill)  # also where it does not read what it is sent
        late.start()

        def read(count: int) -> bytes:
            answer = bytearray()
            while len(answer) < count:
                ready = selector.select(0.1)
                if stopped():
                    raise _failed(request["place"], "somebody who waits for the video, got nobody")
                if time.monotonic() > deadline:
                    raise _failed(request["place"], f"a video that is read in {MAX_SECONDS:g} s, got a longer one")
                part = os.read(output, count - len(answer)) if ready else None
                if part == b"":
                    raise _failed(request["place"], "a video that can be decoded, got one that ended its decoder")
                answer += part or b""
            return bytes(answer)

        try:
            with suppress(BrokenPipeError):  # it has ended; so does what it says
                process.stdin.write(head + data)
                process.stdin.close()
            yield read
        finally:
            late.cancel()
            process.kill()


def _message(read: Callable[[int], bytes], place: str) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(read(_LENGTH.size))
    message: dict[str, Any] = json.loads(read(length))
    if "error" in message:
        raise RequestError(message["error"], hint=message["hint"])
    return message


def _failed(place: str, expected: str) -> RequestError:
    return RequestError(f"{place}: expected {expected}")


def main() -> None:
    """Read a request, and answer it: in the process."""
    request = json.loads(sys.stdin.buffer.readline())
    resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    data = sys.stdin.buffer.read()
    try:
        if request["format"] is None:
            check_video(data, request["place"])
        else:
            lists = {name: tuple(value) for name, value in request["format"].items() if isinstance(value, list)}
            format = ImageFormat(**(request["format"] | lists))
            for clip in read_video(data, format, request["place"], request["most"]).clips:
                _say({"seconds": clip.seconds, "shape": clip.image.pixels.shape}, clip.image.pixels.tobytes())
        _say({"end": True})
    except HybridK2Error as error:
        _say({"error": error.message, "hint": error.hint})


def _say(message: Mapping[str, Any], pixels: bytes = b"") -> None:
    text = json.dumps(message).encode()
    sys.stdout.buffer.write(_LENGTH.pack(len(text)) + text + pixels)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

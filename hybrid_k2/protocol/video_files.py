"""Video files of strangers, made into frames.

Whatever the bytes are, the outcome is frames or one RequestError. Demuxers and decoders are those of PyAV (FFmpeg), a
large surface: only the ones in FORMATS and CODECS are let near a file. No demuxer opens another file or a connection,
and what FFmpeg logs is not passed on: PyAV drops it unless a process asks for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

from hybrid_k2.errors import MemoryBudgetError, RequestError, shown

if TYPE_CHECKING:
    from PIL import Image as PillowImage

FORMATS = ("mov", "avi", "flv", "matroska", "mpeg", "mpegvideo", "asf")  # FFmpeg's names; mov: MP4 and 3GPP, too
CODECS = (
    *("h264", "hevc", "libdav1d", "vp8", "vp9"),
    *("mpeg4", "mpeg2video", "mpeg1video", "h263", "flv", "mjpeg"),
    *("msmpeg4", "msmpeg4v2", "wmv1", "wmv2", "wmv3", "vc1"),
)
MIN_PYAV = (17, 1)  # with options, older ones write beyond their memory where a file names its streams late
MAX_PIXELS = 36_864 * 256  # of a frame: 4096 x 2304, what level 5.2 of H.264 allows
MAX_FRAMES = 2**18  # 2.4 hours at 30 a second
MAX_SECONDS = 120.0  # of decoding
THREADS = 4  # of a decoder; each may hold a frame

# A frame may be larger than the file says. And a decoder of H.264 that is not strict loses frames at the beginning of a
# stream that does not say how many it has to look ahead.
_DECODING = {"max_pixels": str(MAX_PIXELS), "strict": "strict"}
_EXPECTED = "an MP4, MOV, 3GPP, AVI, FLV, WebM, MPEG or WMV video"
# One video at a time: a decoder may hold some twenty frames.
_decoding = threading.Lock()


class VideoFile:
    """A video file while it is read, as a context: no other one is read meanwhile."""

    def __init__(self, data: bytes, place: str, stopped: Callable[[], bool] = lambda: False) -> None:
        """`place`: what errors name; `stopped`: asked with each packet whether to give up."""
        self._data = data
        self._place = place
        self._stopped = stopped
        self._deadline = 0.0
        self.decoded = 0  # frames that the last run of `frames` has seen

    def __enter__(self) -> VideoFile:
        _decoding.acquire()
        self._deadline = time.monotonic() + MAX_SECONDS
        return self

    def __exit__(self, *_: object) -> None:
        _decoding.release()

    def measure(self) -> tuple[int, float]:
        """Count the packets, which most often have a frame each, and return the frames in a second.

        Nothing is decoded. What the file says of its frames' number is not believed.
        Raises: RequestError; MemoryBudgetError.
        """
        with self._opened() as (container, stream):
            count = 0
            times: list[int] = []
            for packet in self._packets(container, stream):
                count += 1
                if packet.pts is not None:
                    times.append(packet.pts)
            seconds = float((max(times) - min(times)) * stream.time_base) if times else 0.0
            rate = float(stream.average_rate or 0) or ((count - 1) / seconds if seconds else 0.0)
        if not count:
            raise RequestError(f"{self._place}: expected a video with frames, got none")
        if count > 1 and not rate:
            raise RequestError(f"{self._place}: expected a video that tells when its frames are shown, got no times")
        return count, rate or 1.0

    def frames(self, wanted: Collection[int]) -> Iterator[PillowImage.Image]:
        """Decode all frames, and yield those whose numbers are wanted, in RGB, as they are shown.

        The rotation that a file asks for is not applied.
        Raises: RequestError; MemoryBudgetError.
        """
        self.decoded = 0
        with self._opened() as (container, stream):
            for packet in self._packets(container, stream, flush=True):
                for frame in packet.decode():
                    self._check_size(frame)
                    if self.decoded in wanted:
                        yield frame.to_image()
                    self.decoded += 1
                    if self.decoded > MAX_FRAMES:
                        raise self._too_many()

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the container, and find its video. What FFmpeg raises of a file becomes a RequestError."""
        av = import_av(self._place)
        # To look into a file FFmpeg would decode some of it, sound and all, without bounds: no decoder is let near it.
        options = {"format_whitelist": ",".join(FORMATS), "codec_whitelist": "none"}
        try:
            with av.open(BytesIO(self._data), options=options, io_open=_open_nothing) as container:
                stream = container.streams.best("video")
                if stream is None:
                    raise RequestError(f"{self._place}: expected a video, got a file without one")
                self._check_codec(stream.codec_context)
                yield container, stream
        except RequestError:
            raise
        except Exception as error:  # a decoder that meets nonsense raises whatever it met
            if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):  # FFmpeg's may be the file's
                raise MemoryBudgetError(f"{self._place}: expected memory to decode a video, got none left") from None
            raise RequestError(
                f"{self._place}: expected {_EXPECTED}, got {len(self._data)} bytes that cannot be read as one",
                hint=f"the file is of another format, damaged, cut short, or has frames of over {MAX_PIXELS} pixels",
            ) from None

    def _check_codec(self, decoder: Any) -> None:
        if decoder is None or decoder.name not in CODECS:
            found = "one that is not known" if decoder is None else shown(decoder.name)
            raise RequestError(f"{self._place}: expected a codec out of {', '.join(CODECS)}, got {found}")
        self._check_size(decoder)
        decoder.options = _DECODING
        decoder.thread_count = THREADS
        decoder.thread_type = "AUTO"

    def _check_size(self, picture: Any) -> None:
        if picture.width * picture.height > MAX_PIXELS:
            raise RequestError(
                f"{self._place}: expected frames of at most {MAX_PIXELS} pixels, got {picture.width} x {picture.height}"
            )

    def _packets(self, container: Any, stream: Any, flush: bool = False) -> Iterator[Any]:
        """Yield the packets of a stream; with `flush`, the empty one at the end, too."""
        count = 0
        for packet in container.demux(stream):
            if time.monotonic() > self._deadline:
                raise RequestError(
                    f"{self._place}: expected a video that is read in {MAX_SECONDS:g} s, got a longer one"
                )
            if self._stopped():
                raise RequestError(f"{self._place}: expected somebody who waits for the video, got nobody")
            if packet.is_corrupt:
                raise ValueError("cut short")  # becomes a RequestError
            if packet.size:
                count += 1
                if count > MAX_FRAMES:
                    raise self._too_many()
            if packet.size or flush:
                yield packet

    def _too_many(self) -> RequestError:
        return RequestError(f"{self._place}: expected a video of at most {MAX_FRAMES} frames, got more")


def import_av(place: str) -> Any:
    """Import PyAV. Raises: RequestError where it, or Pillow, is missing or too old."""
    try:
        import av
        import PIL  # noqa: F401
    except ImportError as error:
        found = f"no {error.name}"
    else:
        if tuple(map(int, av.__version__.split(".")[:2])) >= MIN_PYAV:
            return av
        found = f"PyAV {av.__version__}"
    raise RequestError(
        f"{place}: expected PyAV {'.'.join(map(str, MIN_PYAV))} or newer and Pillow to read video with, got {found}",
        hint="pip install --upgrade av pillow",
    )


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> Any:
    raise PermissionError("a video is one file")

"""A video as the model sees it: clips of a few frames each, with the time at which each begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from hybrid_k2.errors import RequestError
from hybrid_k2.protocol.images import Image, ImageFormat, padded
from hybrid_k2.protocol.video_files import VideoFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image as PillowImage


@dataclass(frozen=True)
class Clip:
    """Frames that are seen as one, and the second in which the first of them is shown."""

    seconds: float
    image: Image

    @property
    def timestamp(self) -> str:
        """Hours, minutes, seconds and thousandths, these cut off; a clock that begins anew after a day."""
        whole = int(self.seconds)
        hours, minutes = whole // 3600 % 24, whole // 60 % 60
        return f"{hours:02}:{minutes:02}:{whole % 60:02}.{int(self.seconds % 1 * 1000):03}"


@dataclass(frozen=True)
class Video:
    """A video that was read."""

    clips: tuple[Clip, ...]

    @property
    def tokens(self) -> int:
        """Tokens that stand for the clips in a prompt, without what is around them."""
        return sum(clip.image.tokens for clip in self.clips)

    @property
    def nbytes(self) -> int:
        """Memory of its pixels."""
        return sum(clip.image.nbytes for clip in self.clips)


def choose_frames(count: int, rate: float, most_rate: float) -> list[int]:
    """Choose evenly among so many frames, of which `rate` are shown in a second: from the first to the last one.

    As the model's own processor does, halves go to even numbers.
    """
    import numpy as np

    wanted = max(round(count * min(most_rate, rate) / rate), 1)
    return [int(index) for index in np.linspace(0, count - 1, wanted).round()]


def check_video(data: bytes, place: str) -> None:
    """Look through a video file without decoding it. Raises: RequestError naming `place`, where it is none."""
    with VideoFile(data, place) as file:
        file.measure()


def read_video(
    data: bytes,
    format: ImageFormat,
    place: str,
    most: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Video:
    """Decode a video file, one frame after the other, and keep those that the model sees, scaled and padded.

    Reading stops with the clip that makes it more than `most` tokens, and with an error where it is `stopped`.
    Raises: RequestError naming `place`.
    """
    with VideoFile(data, place, stopped) as file:
        count, rate = file.measure()
        while True:
            chosen = choose_frames(count, rate, format.frame_rate)
            video = Video(tuple(_read_clips(file, chosen, rate, format, most)))
            if file.decoded == count or (most is not None and video.tokens > most):
                return video
            if not file.decoded:
                raise RequestError(f"{place}: expected a video with frames, got none that can be decoded")
            count = file.decoded  # some packets had no frame, or several: now it is known


def _read_clips(
    file: VideoFile, chosen: Sequence[int], rate: float, format: ImageFormat, most: int | None
) -> Iterator[Clip]:
    import numpy as np

    tokens = 0
    frames = file.frames(set(chosen))
    for first in chosen[:: format.clip_frames]:
        scaled = list(_scaled(islice(frames, format.clip_frames), format))
        if not scaled:
            return  # there are fewer frames than packets
        pixels = np.stack(scaled)
        pixels.flags.writeable = False
        image = Image(pixels, format)
        yield Clip(first / rate, image)
        tokens += image.tokens
        if most is not None and tokens > most:
            return
    for _ in frames:  # count the rest
        pass


def _scaled(frames: Iterable[PillowImage.Image], format: ImageFormat) -> Iterator[NDArray[np.uint8]]:
    """Scale and pad the frames of one clip as its first one."""
    import numpy as np
    from PIL import Image as PillowImage

    size: tuple[int, int] | None = None
    for frame in frames:
        size = size or format.fit_frame(*frame.size)
        scaled = frame if size == frame.size else frame.resize(size, PillowImage.Resampling.BICUBIC)
        yield padded(np.asarray(scaled), format)

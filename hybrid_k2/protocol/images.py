"""An image or a clip as the model sees it: how it is scaled, padded and cut into patches, its tokens in a prompt."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_k2.errors import ConfigError, shown
from hybrid_k2.fields import Fields
from hybrid_k2.files import parse_json_object, read_file
from hybrid_k2.protocol.image_files import decode_pixels

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

PREPROCESSOR_NAME = "preprocessor_config.json"

IMAGE_BASE = 1 << 160  # ids from here on are rows of images, not of the vocabulary
_ROW_BITS = 16
MAX_ROWS = 1 << _ROW_BITS  # tokens of one image
_DIGEST_BYTES = 16

MAX_CLIP_FRAMES = 4  # the tower knows the times of so many
_MOST = 2**16  # of the sizes in a configuration; K2.6's largest is a quarter of it
_LEAST_STD = 0.001  # less than a step of eight bits makes no sense, and far less divides by what fp32 takes for zero


@dataclass(frozen=True)
class ImageFormat:
    """How a checkpoint wants its images and the frames of videos; the defaults are K2.6's."""

    patch_size: int = 14  # pixels a side
    merge: int = 2  # patches a side that become one token
    patch_limit: int = 16384  # whole patches of an image before padding; larger images are scaled down
    side_limit: int = 512  # patches along a side
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green and blue, where 255 is 1
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    frame_patch_limit: int = 4096  # of a video's frame, as `patch_limit` is of an image
    frame_rate: float = 2.0  # frames of a video that are seen in a second, at most
    clip_frames: int = 4  # that are seen as one, at most

    @classmethod
    def load(cls, folder: str | Path) -> ImageFormat:
        """Read `media_proc_cfg` of preprocessor_config.json; what is absent, or the whole file, is as in K2.6.

        Raises: ConfigError naming file and field; UnsupportedModelError for a fixed number of tokens.
        """
        path = Path(folder) / PREPROCESSOR_NAME
        if not os.path.lexists(path):
            return cls()
        data = parse_json_object(read_file(path, ConfigError), str(path), ConfigError)
        given = Fields({"media_proc_cfg": {}} | data, str(path)).json_object("media_proc_cfg")
        return cls._from_fields(Fields(_K26 | given, f"{path}: media_proc_cfg"))

    @classmethod
    def _from_fields(cls, fields: Fields) -> ImageFormat:
        for name, value, reason in _FIXED_FIELDS:
            fields.must_be(name, value, reason)
        found = cls(
            _size(fields, "patch_size"),
            _size(fields, "merge_kernel_size"),
            _size(fields, "in_patch_limit"),
            _size(fields, "patch_limit_on_one_side"),
            _three_numbers(fields, "image_mean"),
            _three_numbers(fields, "image_std", above=_LEAST_STD),
            _size(fields, "in_patch_limit_each_frame"),
            fields.number("sample_fps"),
            _size(fields, "temporal_merge_kernel_size", MAX_CLIP_FRAMES),
        )
        for what, most in (("an image", found.max_tokens), ("a frame", found.max_frame_tokens)):
            if most > MAX_ROWS:
                raise ConfigError(
                    f"{fields.place}: expected limits that give {what} at most {MAX_ROWS} tokens, got {most}"
                )
        return found

    @property
    def max_tokens(self) -> int:
        """No image takes more tokens than this; in K2.6, 4482."""
        return self._most_tokens(self.patch_limit)

    @property
    def max_frame_tokens(self) -> int:
        """No clip takes more tokens than this; in K2.6, 1374."""
        return self._most_tokens(self.frame_patch_limit)

    def _most_tokens(self, patch_limit: int) -> int:
        """Bound the tokens of what is scaled to a limit of patches.

        The limit counts whole patches before scaling. So an image that is u x v patches large after it, parts of
        patches included, keeps (u - 1)(v - 1) below the limit; and r x c tokens take u > merge (r - 1),
        v > merge (c - 1).
        """
        most_rows = -(-self.side_limit // self.merge)

        def rows(columns: int) -> int:
            width = self.merge * (columns - 1) - 1
            height = self.side_limit if width <= 0 else (patch_limit - 1) // width + 1
            return min(most_rows, height // self.merge + 1)

        return max(columns * rows(columns) for columns in range(1, most_rows + 1))

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that an image is resized to: never larger, each side cut to whole pixels."""
        return self._fit(width, height, self.patch_limit)

    def fit_frame(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that a video's frame is resized to."""
        return self._fit(width, height, self.frame_patch_limit)

    def _fit(self, width: int, height: int, patch_limit: int) -> tuple[int, int]:
        whole = max(1.0, width // self.patch_size) * max(1.0, height // self.patch_size)
        most = self.side_limit * self.patch_size
        scale = min(1.0, math.sqrt(patch_limit / whole), most / width, most / height)
        return min(max(1, int(width * scale)), most), min(max(1, int(height * scale)), most)


@dataclass(frozen=True, eq=False)
class Image:
    """An image that is decoded, resized and padded, or a clip: frames of a video that are seen as one.

    Equal ones have equal digests.
    Shapes: pixels [height, width, 3] of an image, [frames, height, width, 3] of a clip; height and width are multiples
    of patch_size * merge.
    """

    pixels: NDArray[np.uint8]
    format: ImageFormat

    @cached_property
    def digest(self) -> int:
        """128 bits of BLAKE2b over the sizes, the format and all pixels."""
        digest = hashlib.blake2b(f"{self.pixels.shape} {self.format}\n".encode(), digest_size=_DIGEST_BYTES)
        digest.update(self.pixels.tobytes())
        return int.from_bytes(digest.digest(), "big")

    @property
    def frames(self) -> int:
        """Frames of a clip; an image has one."""
        return 1 if self.pixels.ndim == 3 else len(self.pixels)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, of every frame."""
        height, width, _ = self.pixels.shape[-3:]
        return height // self.format.patch_size, width // self.format.patch_size

    @property
    def tokens(self) -> int:
        """Tokens that stand for the image in a prompt, whatever the number of its frames."""
        rows, columns = self.grid
        return rows * columns // self.format.merge**2

    @property
    def nbytes(self) -> int:
        """Memory of its pixels."""
        return self.pixels.nbytes

    def patches(self) -> torch.Tensor:
        """Return the patches, frame after frame, row by row: (v / 255 - mean) / std.

        Shapes: -> fp32 [frames * rows * columns, 3, patch_size, patch_size].
        """
        import numpy as np
        import torch

        rows, columns = self.grid
        side = self.format.patch_size
        cut = self.pixels.reshape(-1, rows, side, columns, side, 3).transpose(0, 1, 3, 5, 2, 4)
        values = cut.reshape(-1, 3, side, side).astype(np.float32)
        values /= np.float32(255)
        values -= np.array(self.format.mean, np.float32)[:, None, None]
        values /= np.array(self.format.std, np.float32)[:, None, None]
        return torch.from_numpy(values)


def read_image(data: bytes, format: ImageFormat, place: str) -> Image:
    """Decode an image file (PNG, JPEG, WebP, GIF) and scale and pad it for the model.

    Raises: RequestError naming `place`; MemoryBudgetError.
    """
    pixels = padded(decode_pixels(data, format.fit, place), format)
    pixels.flags.writeable = False
    return Image(pixels, format)


def padded(pixels: NDArray[np.uint8], format: ImageFormat) -> NDArray[np.uint8]:
    """Add black (0) at the right and the bottom, up to whole tokens. Shapes: [height, width, 3]."""
    import numpy as np

    height, width, _ = pixels.shape
    side = format.patch_size * format.merge
    return np.pad(pixels, ((0, -height % side), (0, -width % side), (0, 0)))


def image_token(digest: int, row: int) -> int:
    """Return the id of one row of an image: equal rows of equal images have one id, in every prompt."""
    return IMAGE_BASE | digest << _ROW_BITS | row


def is_image_token(token: int) -> bool:
    """Say whether an id is a row of an image and none of the vocabulary."""
    return token >= IMAGE_BASE


def image_of_token(token: int) -> tuple[int, int]:
    """Return the digest of an image token's image, and its row."""
    return (token ^ IMAGE_BASE) >> _ROW_BITS, token & (MAX_ROWS - 1)


def _size(fields: Fields, name: str, most: int = _MOST) -> int:
    size = fields.integer(name)
    if size > most:
        raise ConfigError(f"{fields.place}: {name}: expected at most {most}, got {size}")
    return size


def _three_numbers(fields: Fields, name: str, above: float = -_MOST) -> tuple[float, float, float]:
    values = fields.get(name, list, "a list of three numbers")
    numbers = [value for value in values if type(value) in (int, float) and above < value <= _MOST]
    if len(values) != 3 or len(numbers) != 3:
        raise ConfigError(
            f"{fields.place}: {name}: expected a list of three numbers above {above}, at most {_MOST}, "
            f"got {shown(values)}"
        )
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


# The defaults by the names of the file.
_K26 = {
    "patch_size": ImageFormat.patch_size,
    "merge_kernel_size": ImageFormat.merge,
    "in_patch_limit": ImageFormat.patch_limit,
    "patch_limit_on_one_side": ImageFormat.side_limit,
    "image_mean": [*ImageFormat.mean],
    "image_std": [*ImageFormat.std],
    "in_patch_limit_each_frame": ImageFormat.frame_patch_limit,
    "sample_fps": ImageFormat.frame_rate,
    "temporal_merge_kernel_size": ImageFormat.clip_frames,
}
# Field, the one value that is implemented, and why any other is refused.
_FIXED_FIELDS: tuple[tuple[str, object, str], ...] = (
    ("fixed_output_tokens", None, "an image has as many tokens as its size gives"),
    ("in_patch_limit_video", None, "every frame of a video has the same limit"),
    ("max_num_frames_each_video", None, "a video has as many frames as its duration gives"),
    ("timestamp_mode", "hh:mm:ss.fff", "clips have their time in hours, minutes and seconds"),
)

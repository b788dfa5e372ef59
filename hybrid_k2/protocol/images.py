"""An image as the model sees it: how it is scaled, padded and cut into patches, and its tokens in a prompt."""

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

_MOST = 2**16  # of the sizes in a configuration; K2.6's largest is a quarter of it
_LEAST_STD = 0.001  # less than a step of eight bits makes no sense, and far less divides by what fp32 takes for zero


@dataclass(frozen=True)
class ImageFormat:
    """How a checkpoint wants its images; the defaults are K2.6's."""

    patch_size: int = 14  # pixels a side
    merge: int = 2  # patches a side that become one token
    patch_limit: int = 16384  # whole patches of an image before padding; larger images are scaled down
    side_limit: int = 512  # patches along a side
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green and blue, where 255 is 1
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

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
        fields.must_be("fixed_output_tokens", None, "an image has as many tokens as its size gives")
        found = cls(
            _size(fields, "patch_size"),
            _size(fields, "merge_kernel_size"),
            _size(fields, "in_patch_limit"),
            _size(fields, "patch_limit_on_one_side"),
            _three_numbers(fields, "image_mean"),
            _three_numbers(fields, "image_std", above=_LEAST_STD),
        )
        if found.max_tokens > MAX_ROWS:
            raise ConfigError(
                f"{fields.place}: expected limits that give an image at most {MAX_ROWS} tokens, got {found.max_tokens}"
            )
        return found

    @property
    def max_tokens(self) -> int:
        """No image takes more tokens than this; in K2.6, 4482.

        The limit counts whole patches before scaling. So an image that is u x v patches large after it, parts of
        patches included, keeps (u - 1)(v - 1) below the limit; and r x c tokens take u > merge (r - 1),
        v > merge (c - 1).
        """
        most_rows = -(-self.side_limit // self.merge)

        def rows(columns: int) -> int:
            width = self.merge * (columns - 1) - 1
            height = self.side_limit if width <= 0 else (self.patch_limit - 1) // width + 1
            return min(most_rows, height // self.merge + 1)

        return max(columns * rows(columns) for columns in range(1, most_rows + 1))

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that an image is resized to: never larger, each side cut to whole pixels."""
        whole = max(1.0, width // self.patch_size) * max(1.0, height // self.patch_size)
        most = self.side_limit * self.patch_size
        scale = min(1.0, math.sqrt(self.patch_limit / whole), most / width, most / height)
        return min(max(1, int(width * scale)), most), min(max(1, int(height * scale)), most)


@dataclass(frozen=True, eq=False)
class Image:
    """An image that is decoded, resized and padded; equal images have equal digests."""

    pixels: NDArray[np.uint8]  # [height, width, 3]; both sides are multiples of patch_size * merge
    format: ImageFormat

    @cached_property
    def digest(self) -> int:
        """128 bits of BLAKE2b over the sizes, the format and all pixels."""
        digest = hashlib.blake2b(f"{self.pixels.shape} {self.format}\n".encode(), digest_size=_DIGEST_BYTES)
        digest.update(self.pixels.tobytes())
        return int.from_bytes(digest.digest(), "big")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width, _ = self.pixels.shape
        return height // self.format.patch_size, width // self.format.patch_size

    @property
    def tokens(self) -> int:
        """Tokens that stand for the image in a prompt."""
        rows, columns = self.grid
        return rows * columns // self.format.merge**2

    def patches(self) -> torch.Tensor:
        """Return the patches, row by row, fp32 [rows * columns, 3, patch_size, patch_size]: (v / 255 - mean) / std."""
        import numpy as np
        import torch

        rows, columns = self.grid
        side = self.format.patch_size
        cut = self.pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        values = cut.reshape(rows * columns, 3, side, side).astype(np.float32)
        values /= np.float32(255)
        values -= np.array(self.format.mean, np.float32)[:, None, None]
        values /= np.array(self.format.std, np.float32)[:, None, None]
        return torch.from_numpy(values)


def read_image(data: bytes, format: ImageFormat, place: str) -> Image:
    """Decode an image file (PNG, JPEG, WebP, GIF) and scale and pad it for the model.

    Pads are black (0), at the right and the bottom, up to whole tokens.
    Raises: RequestError naming `place`; MemoryBudgetError.
    """
    import numpy as np

    decoded = decode_pixels(data, format.fit, place)
    height, width, _ = decoded.shape
    token_side = format.patch_size * format.merge
    pixels = np.pad(decoded, ((0, -height % token_side), (0, -width % token_side), (0, 0)))
    pixels.flags.writeable = False
    return Image(pixels, format)


def image_token(digest: int, row: int) -> int:
    """Return the id of one row of an image: equal rows of equal images have one id, in every prompt."""
    return IMAGE_BASE | digest << _ROW_BITS | row


def is_image_token(token: int) -> bool:
    """Say whether an id is a row of an image and none of the vocabulary."""
    return token >= IMAGE_BASE


def image_of_token(token: int) -> tuple[int, int]:
    """Return the digest of an image token's image, and its row."""
    return (token ^ IMAGE_BASE) >> _ROW_BITS, token & (MAX_ROWS - 1)


def _size(fields: Fields, name: str) -> int:
    size = fields.integer(name)
    if size > _MOST:
        raise ConfigError(f"{fields.place}: {name}: expected at most {_MOST}, got {size}")
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
}

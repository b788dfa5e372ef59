"""Pictures and their files for tests; PNG is written without the library that reads it."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid_k2.protocol import Image, ImageFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray


def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return pixels of noise [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def random_image(rows: int, columns: int, seed: int, patch: int = 14, frames: int | None = None) -> Image:
    """Draw noise of so many patches, each of `patch` pixels a side; with `frames`, a clip."""
    source = np.random.default_rng(seed)
    shape = (rows * patch, columns * patch, 3)
    pixels = source.integers(0, 256, shape if frames is None else (frames, *shape), dtype=np.uint8)
    return Image(pixels, ImageFormat(patch_size=patch))


def png(pixels: NDArray[np.uint8], claimed: tuple[int, int] | None = None) -> bytes:
    """Write a picture as PNG; `claimed`: another width and height than it has."""
    height, width, _ = pixels.shape
    head = struct.pack(">IIBBBBB", *(claimed or (width, height)), 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = (_chunk(b"IHDR", head), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def noise_png(width: int, height: int, seed: int = 0) -> bytes:
    """Return an image of noise as a PNG file."""
    return png(picture(width, height, seed))


def coded(data: bytes) -> str:
    """Return base64, as requests have it."""
    return base64.b64encode(data).decode()


def uri(data: bytes) -> str:
    """Return a PNG file as a `data:` URI."""
    return f"data:image/png;base64,{coded(data)}"


def ask(*parts: bytes | str) -> list[dict[str, Any]]:
    """Return the messages of a question that consists of texts and image files."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}]

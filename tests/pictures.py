"""Image files for tests."""

from __future__ import annotations

import io
from typing import Any

import numpy as np


def noise_png(width: int, height: int, seed: int = 0) -> bytes:
    """Write an image of noise as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def ask(*parts: bytes | str) -> list[dict[str, Any]]:
    """Return the messages of a question that consists of texts and image files."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}]

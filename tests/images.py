"""Random images for tests of the vision tower."""

from __future__ import annotations

import numpy as np

from hybrid_k2.protocol import Image, ImageFormat


def random_image(rows: int, columns: int, seed: int, patch: int = 14, frames: int | None = None) -> Image:
    """Draw noise of so many patches, each of `patch` pixels a side; with `frames`, a clip."""
    source = np.random.default_rng(seed)
    shape = (rows * patch, columns * patch, 3)
    pixels = source.integers(0, 256, shape if frames is None else (frames, *shape), dtype=np.uint8)
    return Image(pixels, ImageFormat(patch_size=patch))

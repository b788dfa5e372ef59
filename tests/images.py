"""Random images for tests of the vision tower."""

from __future__ import annotations

import numpy as np

from hybrid_k2.protocol import Image, ImageFormat


def random_image(rows: int, columns: int, seed: int, patch: int = 14) -> Image:
    """Draw noise of so many patches, each of `patch` pixels a side."""
    source = np.random.default_rng(seed)
    pixels = source.integers(0, 256, (rows * patch, columns * patch, 3), dtype=np.uint8)
    return Image(pixels, ImageFormat(patch_size=patch))

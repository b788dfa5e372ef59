"""Sizes and patches of images against transformers' own processor for Kimi K2.5, where torchvision lets it run.

It scales with torchvision, the model's own processor with Pillow, so pixels are compared where nothing is scaled.
"""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch

from hybrid_k2.protocol import ImageFormat, read_image

pillow = pytest.importorskip("PIL.Image", reason="Pillow decodes the images: pip install pillow")
pytest.importorskip("torchvision", reason="transformers' image processor needs it: pip install torchvision")
processors = pytest.importorskip("transformers.models.kimi_k25.image_processing_kimi_k25", reason="the oracle")


@pytest.mark.parametrize("seed", range(30))
def test_images_that_are_not_scaled_have_the_same_patches(seed: int) -> None:
    chance = random.Random(seed)
    width, height = chance.randrange(1, 400), chance.randrange(1, 400)
    picture = pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    expected = processors.Kimi_K25ImageProcessor()(images=[picture], return_tensors="pt")
    file = io.BytesIO()
    picture.save(file, "PNG")
    image = read_image(file.getvalue(), ImageFormat(), "image")
    assert expected["image_grid_thw"].tolist() == [[1, *image.grid]]
    # rescaling and normalising are one operation there: two roundings of values up to 1 may differ
    torch.testing.assert_close(image.patches(), expected["pixel_values"], rtol=0, atol=2.0**-22)


@pytest.mark.parametrize("seed", range(300))
def test_sizes_are_the_same(seed: int) -> None:
    chance = random.Random(seed)
    format = ImageFormat(
        patch_size=chance.randrange(1, 20),
        merge=chance.randrange(1, 4),
        patch_limit=chance.randrange(1, 20_000),
        side_limit=chance.randrange(1, 600),
    )
    width, height = (chance.choice([chance.randrange(1, 300), chance.randrange(1, 65_536)]) for _ in range(2))
    resized, _ = processors.navit_resize(
        height, width, format.patch_size, format.merge, format.patch_limit, format.side_limit
    )
    assert format.fit(width, height) == resized[::-1]

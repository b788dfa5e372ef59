"""Random images, cut into patches, for tests of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomPatches:
    """Stand for an image, or the frames of a clip, cut into patches."""

    grid: tuple[int, int]
    values: Tensor
    frames: int = 1

    def patches(self) -> Tensor:
        """Return the normalised pixels [frames * N, 3, patch, patch], in memory of their own as of a real image."""
        return self.values.clone()


def random_patches(rows: int, columns: int, seed: int, patch: int = 14, frames: int = 1) -> RandomPatches:
    """Draw an image, or a clip, of so many patches."""
    source = torch.Generator().manual_seed(seed)
    values = 2 * torch.rand(frames * rows * columns, 3, patch, patch, generator=source) - 1
    return RandomPatches((rows, columns), values, frames)

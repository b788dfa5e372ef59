"""Random images, cut into patches, for tests of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomPatches:
    """Stand for an image that was cut into patches."""

    grid: tuple[int, int]
    values: Tensor

    def patches(self) -> Tensor:
        """Return the normalised pixels [N, 3, patch, patch], in memory of their own as of a real image."""
        return self.values.clone()


def random_patches(rows: int, columns: int, seed: int, patch: int = 14) -> RandomPatches:
    """Draw an image of so many patches."""
    source = torch.Generator().manual_seed(seed)
    return RandomPatches((rows, columns), 2 * torch.rand(rows * columns, 3, patch, patch, generator=source) - 1)

"""Rotary position embedding with static YaRN, in interleaved order: pair i is columns 2i and 2i + 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_k2.config import ModelConfig, RopeScaling
from hybrid_k2.model.devices import upload
from hybrid_k2.model.layers import rowwise


@dataclass(frozen=True)
class Rotation:
    """Hold cos and sin of the angles of some positions, YaRN's multiplier included.

    Shapes: cos, sin [T, rope/2] fp32.
    """

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotate the pairs of the last dimension in fp32.

        Shapes: x [T, ..., rope] -> [T, ..., rope] fp32.
        """
        between = (1,) * (x.dim() - 2)
        cos = self.cos.view(self.cos.shape[0], *between, -1)  # [T, 1.., rope/2]
        sin = self.sin.view(self.sin.shape[0], *between, -1)  # [T, 1.., rope/2]
        a, b = x[..., 0::2].float(), x[..., 1::2].float()  # [T, .., rope/2] each
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)  # [T, .., rope]

    def to(self, device: torch.device) -> Rotation:
        """Return the same angles on another device."""
        return self if self.cos.device == device else Rotation(upload(self.cos, device), upload(self.sin, device))


class Rope:
    """Compute rotations for positions; the frequencies are fixed by the configuration, whatever the length."""

    def __init__(self, config: ModelConfig) -> None:
        self.inv_freq = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
        self.scale = 1.0 if config.rope_scaling is None else config.rope_scaling.rotary_scale

    def rotation(self, positions: Tensor) -> Rotation:
        """Return the rotation of each position.

        Shapes: positions [T] int64, on the host.
        """
        # The model was trained with fp32 angles; wider ones would differ from it by up to 0.01 rad at 200k tokens.
        angles = positions.float()[:, None] * self.inv_freq  # [T, rope/2]
        return Rotation(rowwise(torch.cos, angles) * self.scale, rowwise(torch.sin, angles) * self.scale)


def inverse_frequencies(size: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return the angle per position of each pair.

    Shapes: [size/2] fp32.
    Source: YaRN (arXiv 2309.00071), with its correction range rounded outward to whole dimensions.
    """
    plain = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)  # [size/2]
    if scaling is None:
        return plain
    low, high = _correction_range(size, theta, scaling)
    share = ((torch.arange(size // 2).float() - low) / (high - low)).clamp(0, 1)  # [size/2] of the slowed frequency
    return plain * (1 - share) + plain / scaling.factor * share


def _correction_range(size: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """Return the pair below which frequencies stay and the pair from which on they are divided by the factor."""

    def pair_with(rotations: float) -> float:
        wavelength = scaling.original_max_position_embeddings / rotations
        return size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), size - 1)
    return low, high if high != low else low + 0.001  # a step instead of a ramp

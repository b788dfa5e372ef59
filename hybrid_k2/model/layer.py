"""One layer: attention and MLP around the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybrid_k2.model.attention import Attention
from hybrid_k2.model.batch import Batch
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layers import RmsNorm, SwiGlu
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.rope import Rotation

if TYPE_CHECKING:
    from hybrid_k2.model.host_layer import HostLayer


@dataclass(frozen=True)
class Layer:
    """Hold one layer; the residual stream lies on the device of its attention.

    `whole` computes all of it in one go, where it can be.
    """

    input_norm: RmsNorm
    attention: Attention
    post_norm: RmsNorm
    mlp: SwiGlu | Moe
    whole: HostLayer | None = None

    @property
    def device(self) -> torch.device:
        """Device of the attention."""
        return self.attention.q_a.device

    def attend(self, x: Tensor, batch: Batch, cache: LatentCache, rotation: Rotation) -> Tensor:
        """Return the residual stream behind the attention.

        Shapes: x [T, hidden] -> [T, hidden].
        """
        return x + self.attention(self.input_norm(x), batch, cache, rotation).to(x)

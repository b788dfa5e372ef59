"""Random experts in layout L32 and their values in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu

from hybrid_k2.checkpoint import ExpertWeights
from hybrid_k2.experts.l32 import fuse_gate_up, pack_l32
from tests.unit.experts_common import random_expert


def pack_expert(weights: ExpertWeights) -> Tensor:
    """The bytes of an expert as the host keeps it: w13, then w2."""
    gate, up, down = (
        (part.packed.numpy(), part.scale.view(torch.int16).numpy().view(np.uint16))
        for part in (weights.gate, weights.up, weights.down)
    )
    w13 = pack_l32(fuse_gate_up(gate[0], up[0]), fuse_gate_up(gate[1], up[1]))
    return torch.from_numpy(np.concatenate((w13.ravel(), pack_l32(*down).ravel())))


def random_l32(count: int, hidden: int, intermediate: int) -> tuple[list[ExpertWeights], Tensor]:
    """Experts, and the same as uint8 [count, bytes]."""
    experts = [random_expert(hidden, intermediate) for _ in range(count)]
    return experts, torch.stack([pack_expert(expert) for expert in experts])


def expected_sums(
    experts: list[ExpertWeights], slot_of_expert: Tensor, x: Tensor, ids: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of a token's experts that have a slot, in float64, and the sum of their norms: the scale of errors.

    Shapes: -> [T, H], [T].
    """
    out, size = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for t, k in np.ndindex(*ids.shape):
        slot = int(slot_of_expert[ids[t, k]])
        if slot >= 0:
            gate, up, down = (
                part.dequantize(torch.float64) for part in (experts[slot].gate, experts[slot].up, experts[slot].down)
            )
            row = x[t].double()
            y = float(weights[t, k]) * (down @ (silu(gate @ row) * (up @ row)))
            out[t] += y
            size[t] += y.norm()
    return out, size

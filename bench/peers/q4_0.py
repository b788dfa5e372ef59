"""The checkpoint's INT4 as ggml's q4_0: the same values; a scale is fp16 there, so not every bf16 scale fits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.peers.exchange import GROUP, Array, Matrix, widen

# One group: the scale, then a byte for each of 16 pairs: low nibble = input j, high = input 16 + j, each as value + 8.
BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", GROUP // 2)])


@dataclass(frozen=True)
class Q40:
    """Hold a matrix in q4_0. Shapes: blocks [rows, inputs / 32]. exact: every scale is the checkpoint's."""

    blocks: Array
    exact: bool


def to_q4_0(matrix: Matrix) -> Q40:
    """Rearrange nibbles, which loses nothing, and narrow scales, which is exact from 2^-17 to 65280."""
    rows, groups = matrix.scales.shape
    pairs = np.ascontiguousarray(matrix.words).view(np.uint8).reshape(rows, groups, GROUP // 2)
    values = np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(rows, groups, GROUP)
    scales = widen(np.asarray(matrix.scales))
    blocks = np.empty((rows, groups), BLOCK)
    with np.errstate(over="ignore"):
        blocks["scale"] = scales.astype(np.float16)
    blocks["nibbles"] = values[..., : GROUP // 2] | values[..., GROUP // 2 :] << 4
    return Q40(blocks, bool((blocks["scale"].astype(np.float32) == scales).all()))

"""Layout L32 in numpy: the readable definition that the native packer is tested against.

A matrix [rows, inputs] becomes blocks of 32 rows by 32 inputs, [row block][group], of 576 bytes:

    64 bytes   scales: 16-bit word 2i is the bf16 scale of row i, word 2i+1 that of row 16+i (i = 0..15)
    512 bytes  values: for q = 0..3 and half = 0..1 one vector of 16 lanes of 4 bytes; lane r is row 16*half + r, and
               byte j holds input 8q+j in the low and input 8q+4+j in the high nibble, each as value + 8

Gate and up are fused before they are packed: a row block holds 16 gate rows and the matching 16 up rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 32
ROW_BLOCK = 32
BLOCK_BYTES = 576
SCALE_BYTES = 64


@dataclass(frozen=True)
class L32Expert:
    """Hold one expert, gate and up fused, and the checksum of its weights as they were loaded.

    Shapes: w13 [I/16, H/32, 576], w2 [H/32, I/32, 576].
    """

    w13: NDArray[np.uint8]
    w2: NDArray[np.uint8]
    checksum: int


def pack_l32(packed: NDArray[np.int32], scale: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Bring a matrix from the checkpoint's form into L32.

    Shapes: packed int32 [rows, inputs/8], scale (bits of bf16) uint16 [rows, inputs/32] -> [rows/32, inputs/32, 576].
    """
    blocks, groups = scale.shape[0] // ROW_BLOCK, scale.shape[1]
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (packed.view(np.uint32)[..., None] >> shifts) & 15  # [rows, words, input in the word]
    # A word is 8 inputs: half 0 or 1 of the rows, row r, group g, word q, nibble pair (low, high), byte j.
    values = nibbles.reshape(blocks, 2, 16, groups, 4, 2, 4).astype(np.uint8)
    pairs = values[..., 0, :] | (values[..., 1, :] << 4)  # [block, half, r, g, q, j]
    lanes = pairs.transpose(0, 3, 4, 1, 2, 5)  # [block, g, q, half, r, j]
    scales = scale.reshape(blocks, 2, 16, groups).transpose(0, 3, 2, 1)  # [block, g, r, half]
    out = np.empty((blocks, groups, BLOCK_BYTES), np.uint8)
    out[..., :SCALE_BYTES] = np.ascontiguousarray(scales).reshape(blocks, groups, 32).view(np.uint8)
    out[..., SCALE_BYTES:] = lanes.reshape(blocks, groups, 512)
    return out


def unpack_l32(blocks: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """Bring a matrix back into the checkpoint's form: the inverse of `pack_l32`."""
    count, groups, _ = blocks.shape
    scales = np.ascontiguousarray(blocks[..., :SCALE_BYTES]).view(np.uint16).reshape(count, groups, 16, 2)
    lanes = blocks[..., SCALE_BYTES:].reshape(count, groups, 4, 2, 16, 4).transpose(0, 3, 4, 1, 2, 5)
    nibbles = np.stack((lanes & 15, lanes >> 4), axis=-2).astype(np.uint32)  # [block, half, r, g, q, low/high, j]
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    words = np.bitwise_or.reduce(nibbles.reshape(count * ROW_BLOCK, groups * 4, 8) << shifts, axis=-1)
    scale = scales.transpose(0, 3, 2, 1).reshape(count * ROW_BLOCK, groups)
    return words.astype(np.uint32).view(np.int32), np.ascontiguousarray(scale)


def fuse_gate_up(gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    """Interleave the rows of gate and up by 16.

    Shapes: [I, n] twice -> [2 I, n].
    """
    return np.stack((gate.reshape(-1, 16, gate.shape[1]), up.reshape(-1, 16, up.shape[1])), axis=1).reshape(
        -1, gate.shape[1]
    )

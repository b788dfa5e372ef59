"""The INT4 weight format of K2.5/K2.6, defined in plain torch.

A quantised matrix [out, in] is stored as `weight_packed` int32 [out, in/8] and `weight_scale` bf16 [out, in/32]. Each
value q in [-8, 7] is stored as the nibble q + 8 (offset binary); a word holds eight consecutive input columns, the
first in its lowest four bits. The weight is (nibble - 8) * scale of its group of 32 input columns. Words are
little-endian on disk, so that on a little-endian host byte b of a row holds columns 2b (low nibble) and 2b + 1.

Source: the format "pack-quantized" of the compressed-tensors package, against which the tests compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid_k2.config import INT4_GROUP

GROUP = INT4_GROUP  # input columns that share one scale
VALUES_PER_WORD = 8
QMIN, QMAX = -8, 7


@dataclass(frozen=True)
class PackedWeight:
    """Hold one INT4 matrix as it is stored.

    Shapes: packed int32 [out, in/8], scale bf16 [out, in/32].
    """

    packed: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's [out, in]."""
        return self.packed.shape[0], self.packed.shape[1] * VALUES_PER_WORD

    @property
    def nbytes(self) -> int:
        """Bytes of words and scales."""
        return self.packed.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix in plain form."""
        return dequantize_int4(self.packed, self.scale, dtype)


def pack_int4(q: Tensor) -> Tensor:
    """Pack values along the last dimension; a last word that is not full is filled up with zero bits.

    Shapes: q int8 [..., in] -> int32 [..., ceil(in/8)].
    Raises: ValueError for another dtype or a value outside [-8, 7].
    """
    if q.dtype != torch.int8:
        raise ValueError(f"pack_int4: expected int8 values, got {q.dtype}")
    if q.numel() and (int(q.min()) < QMIN or int(q.max()) > QMAX):
        raise ValueError(f"pack_int4: expected values in [{QMIN}, {QMAX}], got {int(q.min())}..{int(q.max())}")
    nibbles = pad((q - QMIN).to(torch.uint8), (0, -q.shape[-1] % VALUES_PER_WORD))
    pairs = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return pairs.contiguous().view(torch.int32)


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """Return the values that `pack_int4` packed.

    Shapes: packed int32 [..., ceil(in_features/8)] -> int8 [..., in_features].
    Raises: ValueError for another dtype or a number of words that does not fit `in_features`.
    """
    words = -(-in_features // VALUES_PER_WORD)
    if packed.dtype != torch.int32 or packed.shape[-1] != words:
        raise ValueError(
            f"unpack_int4: expected int32 [..., {words}] for {in_features} columns, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    pairs = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(-2)
    return nibbles[..., :in_features].to(torch.int8) + QMIN


def dequantize_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return value * scale; exact in FP32, one rounding in narrower dtypes.

    Shapes: packed int32 [out, in/8], scale [out, in/32] -> [out, in].
    Raises: ValueError for shapes that do not belong together.
    """
    out_features, in_features = packed.shape[0], packed.shape[-1] * VALUES_PER_WORD
    if tuple(scale.shape) != (out_features, in_features // GROUP) or in_features % GROUP:
        raise ValueError(
            f"dequantize_int4: expected scales [{out_features}, {in_features / GROUP:g}] "
            f"for words {list(packed.shape)}, got {list(scale.shape)}"
        )
    groups = unpack_int4(packed, in_features).to(torch.float32).view(out_features, in_features // GROUP, GROUP)
    return (groups * scale.to(torch.float32).unsqueeze(-1)).view(out_features, in_features).to(dtype)


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to INT4: per group the scale is max|w| / 7, rounded to bf16, and values go to the nearest.

    Shapes: weight [out, in] -> packed int32 [out, in/8], scale bf16 [out, in/32].
    Raises: ValueError if `in` is not a multiple of 32.
    """
    if weight.ndim != 2 or weight.shape[1] % GROUP:
        raise ValueError(f"quantize_int4: expected [out, a multiple of {GROUP}], got {list(weight.shape)}")
    groups = weight.to(torch.float32).reshape(weight.shape[0], weight.shape[1] // GROUP, GROUP)
    scale = (groups.abs().amax(dim=-1) / QMAX).to(torch.bfloat16)
    divisor = torch.where(scale == 0, 1, scale.to(torch.float32)).unsqueeze(-1)  # a group of zeros keeps scale 0
    q = (groups / divisor).round().clamp(QMIN, QMAX).to(torch.int8)
    return pack_int4(q.view(weight.shape)), scale

"""The vision tower (MoonViT) and its projector: an image's patches become rows of the language model.

    patches ─ linear, + learned grid of positions ─► [ + wo(attention(norm0)), + fc1(gelu(fc0(norm1))) ]×L ─ norm
            ─ 2×2 patches side by side ─► norm of each ─ linear ─ gelu ─ linear ─► one row for each token

Every patch of an image attends to all others; two images never meet. The residual stream and what norms compute is
fp32; products are bf16 where weights and machine have it, else fp32. One image is encoded in steps of one block, or a
piece of one where it is large, so that other work can be done in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.model.room import room_for
from hybrid_k2.placement.memories import HOST
from hybrid_k2.protocol import Image
from hybrid_k2.vision_config import LAYER_NORM_EPS, MERGE, ROPE_THETA, VisionConfig

PIECE = 2048  # patches that are computed with at a time: what only they need stays small, and so does a step


@dataclass(frozen=True)
class Affine:
    """Compute weight · x + bias in a dtype of the product's own.

    Shapes: weight [out, in], bias [out], x [T, in] -> [T, out] in the product's dtype.
    """

    weight: Tensor
    bias: Tensor
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.dtype), self.weight.to(self.dtype), self.bias.to(self.dtype))


@dataclass(frozen=True)
class LayerNorm:
    """Subtract the mean, divide by the deviation, scale and shift, in fp32.

    Shapes: weight, bias [n], x [..., n] -> [..., n] fp32.
    """

    weight: Tensor
    bias: Tensor
    eps: float = LAYER_NORM_EPS

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight.float(), self.bias.float(), self.eps)


@dataclass(frozen=True)
class Block:
    """Hold the weights of one block."""

    norm0: LayerNorm
    wqkv: Affine
    wo: Affine
    norm1: LayerNorm
    fc0: Affine
    fc1: Affine

    def add_to(self, x: Tensor, rotation: Tensor, heads: int) -> Iterator[None]:
        """Add attention, then the MLP, to the residual stream: a piece of it, then yield, then the next one.

        Torch's fused attention never holds the scores of all pairs.
        Shapes: x [N, hidden] fp32, changed in place; rotation [N, head/2] complex.
        """
        q, k, v = self._heads(x, rotation, heads)
        for rows in pieces(len(x)):
            attended = functional.scaled_dot_product_attention(q[:, :, rows], k, v)  # [1, heads, piece, head]
            x[rows] += self.wo(attended[0].transpose(0, 1).flatten(1))
            x[rows] += self.fc1(functional.gelu(self.fc0(self.norm1(x[rows])), approximate="tanh"))
            yield

    def _heads(self, x: Tensor, rotation: Tensor, heads: int) -> Tensor:
        """Compute queries, keys and values of all patches, in the product's dtype.

        Shapes: -> [3, 1, heads, N, head].
        """
        count, width = x.shape
        parts = x.new_empty(3, 1, heads, count, width // heads, dtype=self.wqkv.dtype)
        for rows in pieces(count):
            q, k, v = self.wqkv(self.norm0(x[rows])).view(-1, 3, heads, width // heads).unbind(1)
            for part, value in zip(parts, (rotate(q, rotation[rows]), rotate(k, rotation[rows]), v), strict=True):
                part[0, :, rows] = value.transpose(0, 1)
        return parts


@dataclass(frozen=True)
class Projector:
    """Hold what makes a row of the language model of four patches."""

    norm: LayerNorm
    inner: Affine
    outer: Affine

    def __call__(self, patches: Tensor) -> Tensor:
        """Shapes: patches [T, 4, hidden] fp32 -> [T, text hidden]."""
        return self.outer(functional.gelu(self.inner(self.norm(patches).flatten(1))))


class VisionModel:
    """Encode images one at a time; built by `load_vision_model`."""

    def __init__(
        self,
        config: VisionConfig,
        embed: Affine,
        positions: Tensor,
        blocks: Sequence[Block],
        final_norm: LayerNorm,
        projector: Projector,
        features_dtype: torch.dtype,
    ) -> None:
        """`positions`: [grid rows, grid columns, hidden]. `features_dtype`: what the language model takes."""
        self.config = config
        self.embed = embed
        self.positions = positions
        self.blocks = list(blocks)
        self.final_norm = final_norm
        self.projector = projector
        self.features_dtype = features_dtype

    @property
    def text_hidden_size(self) -> int:
        """Width of the rows that it gives."""
        return self.config.text_hidden_size

    @property
    def device(self) -> torch.device:
        """Where it computes, and where its rows are."""
        return self.positions.device

    def begin(self, image: Image) -> Encoding:
        """Prepare to encode an image; nothing is computed yet."""
        return Encoding(self, image)

    def encode(self, image: Image) -> Tensor:
        """Encode an image at once.

        Shapes: -> [tokens, text_hidden_size].
        """
        encoding = self.begin(image)
        while not encoding.step():
            pass
        return encoding.features

    def with_blocks(self, blocks: Iterable[int]) -> VisionModel:
        """Return a tower of these blocks alone, which has the same weights."""
        chosen = [self.blocks[block] for block in blocks]
        parts = self.embed, self.positions, chosen, self.final_norm, self.projector
        return VisionModel(self.config, *parts, self.features_dtype)

    def close(self) -> None:
        """Release the weights; nothing can be encoded any more."""
        self.blocks.clear()
        del self.embed, self.positions, self.final_norm, self.projector


class Encoding:
    """One image on its way: its patches, then block by block, then its rows."""

    def __init__(self, model: VisionModel, image: Image) -> None:
        self.features = torch.empty(0)  # [tokens, text_hidden_size] once `step` has said so
        self._steps = self._run(model, image)
        self._device = HOST if model.device.type == "cpu" else str(model.device)

    @torch.inference_mode()
    def step(self) -> bool:
        """Compute a part: the patches' embedding, a piece of one block, or the rows. True when `features` is there.

        Raises: MemoryBudgetError; what failed cannot go on.
        """
        with room_for("image", self._device):
            done = next(self._steps, True)
        if done and not self.features.numel():
            raise ValueError("encoding: expected one that goes on, got one that has failed")
        return done

    def _run(self, model: VisionModel, image: Image) -> Iterator[bool]:
        rows, columns = image.grid
        heads = model.config.num_attention_heads
        x = position_grid(model.positions, rows, columns)  # [N, hidden] fp32, the residual stream
        patches = image.patches().to(model.device).flatten(1)
        for part in pieces(len(x)):
            x[part] += model.embed(patches[part])
        del patches
        rotation = rotations(rows, columns, model.config.head_dim, model.device)
        yield False
        for block in model.blocks:
            for _ in block.add_to(x, rotation, heads):
                yield False
        x = merge(x, rows, columns)  # [tokens, 4, hidden]
        features = x.new_empty(len(x), model.text_hidden_size, dtype=model.features_dtype)
        for part in pieces(len(x), patches=x.shape[1]):
            features[part] = model.projector(model.final_norm(x[part]))
        self.features = features


def pieces(count: int, patches: int = 1) -> Iterator[slice]:
    """Divide rows of so many patches each into slices of no more than a piece."""
    step = PIECE // patches
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def position_grid(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Stretch the learned grid over an image of this many patches: bicubic (a = -0.75), clamped at the border.

    Shapes: positions [grid rows, grid columns, hidden] -> [rows * columns, hidden] fp32, memory of its own.
    """
    grid = positions.float().permute(2, 0, 1)[None]  # [1, hidden, grid rows, grid columns]
    stretched = functional.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return stretched[0].flatten(1).t().contiguous()


def rotations(rows: int, columns: int, head_dim: int, device: torch.device) -> Tensor:
    """Return the angle of every rotary pair of every patch, as complex numbers of size one.

    Pairs take turns: the first turns with the column, the second with the row, both at the first frequency; and so on.
    Shapes: -> [rows * columns, head_dim / 2], complex.
    """
    steps = torch.arange(0, head_dim, 4, dtype=torch.float32, device=device)
    frequencies = ROPE_THETA ** (-steps / head_dim)  # [head_dim / 4]
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    places = torch.stack((column.flatten(), row.flatten()), -1)  # [N, 2]
    angles = (frequencies[None, :, None] * places[:, None, :]).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring columns of every head, in fp32.

    Shapes: x [N, heads, head], rotation [N, head/2] complex -> [N, heads, head] fp32.
    """
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))  # [N, heads, head/2]
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2)


def merge(x: Tensor, rows: int, columns: int) -> Tensor:
    """Put the patches of every token side by side: above left, above right, below left, below right.

    Shapes: x [rows * columns, hidden] -> [rows * columns / 4, 4, hidden].
    """
    split = x.view(rows // MERGE, MERGE, columns // MERGE, MERGE, -1).transpose(1, 2)
    return split.reshape(-1, MERGE * MERGE, x.shape[1])

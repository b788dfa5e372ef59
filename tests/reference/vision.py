"""The vision tower and its projector in float64, written out step by step from the tensors of a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybrid_k2.vision_config import VisionConfig

Weights = dict[str, Tensor]


def features(patches: Tensor, rows: int, columns: int, weights: Weights, config: VisionConfig) -> Tensor:
    """Encode one image. Shapes: patches [rows * columns, 3, patch, patch] -> [tokens, text hidden]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    tower = "vision_tower"
    x = affine(patches.double().flatten(1), w, f"{tower}.patch_embed.proj")  # [N, hidden]
    x = x + positions(w[f"{tower}.patch_embed.pos_emb.weight"], rows, columns)
    for i in range(config.num_hidden_layers):
        block = f"{tower}.encoder.blocks.{i}"
        x = x + attention(norm(x, w, f"{block}.norm0"), rows, columns, w, block, config)
        inner = affine(norm(x, w, f"{block}.norm1"), w, f"{block}.mlp.fc0")
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + affine(gelu, w, f"{block}.mlp.fc1")
    x = norm(x, w, f"{tower}.encoder.final_layernorm")
    x = norm(x, w, "mm_projector.pre_norm", config.projector_norm_eps)
    tokens = []
    for row in range(0, rows, 2):
        for column in range(0, columns, 2):
            four = [(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)]
            tokens.append(torch.cat([x[r * columns + c] for r, c in four]))
    inner = affine(torch.stack(tokens), w, "mm_projector.proj.0")
    return affine(0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))), w, "mm_projector.proj.2")


def affine(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]


def norm(x: Tensor, weights: Weights, name: str, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def positions(grid: Tensor, rows: int, columns: int) -> Tensor:
    """Bicubic, a = -0.75, centres half a pixel in, the border repeated. Shapes: -> [rows * columns, hidden]."""
    down, across = taps(rows, grid.shape[0]), taps(columns, grid.shape[1])
    return torch.einsum("rg,ch,ghd->rcd", down, across, grid).flatten(0, 1)


def taps(size: int, grid: int) -> Tensor:
    """Weigh the points of the grid for each place along one side. Shapes: -> [size, grid]."""
    a = -0.75
    weights = torch.zeros(size, grid, dtype=torch.float64)
    for i in range(size):
        place = (i + 0.5) * grid / size - 0.5
        first = math.floor(place)
        for point in range(first - 1, first + 3):
            d = abs(place - point)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(point, 0), grid - 1)] += near if d <= 1 else far
    return weights


def attention(x: Tensor, rows: int, columns: int, weights: Weights, block: str, config: VisionConfig) -> Tensor:
    """Every patch attends to all, head by head. Shapes: x [N, hidden] -> [N, hidden]."""
    q, k, v = affine(x, weights, f"{block}.wqkv").chunk(3, dim=1)
    size = config.hidden_size // config.num_attention_heads
    heads = []
    for head in range(config.num_attention_heads):
        part = slice(head * size, (head + 1) * size)
        queries, keys = (rotated(one[:, part], rows, columns) for one in (q, k))
        heads.append(torch.softmax(queries @ keys.T / math.sqrt(size), dim=-1) @ v[:, part])
    return affine(torch.cat(heads, dim=1), weights, f"{block}.wo")


def rotated(x: Tensor, rows: int, columns: int) -> Tensor:
    """Turn pairs 0, 2, 4, ... by the column, pairs 1, 3, 5, ... by the row. Shapes: [N, head] -> [N, head]."""
    out = torch.empty_like(x)
    size = x.shape[1]
    row = torch.arange(rows).repeat_interleave(columns).double()
    column = torch.arange(columns).repeat(rows).double()
    for pair in range(size // 2):
        angle = (column if pair % 2 == 0 else row) * 10000.0 ** (-4 * (pair // 2) / size)
        left, right = x[:, 2 * pair], x[:, 2 * pair + 1]
        out[:, 2 * pair] = left * angle.cos() - right * angle.sin()
        out[:, 2 * pair + 1] = left * angle.sin() + right * angle.cos()
    return out

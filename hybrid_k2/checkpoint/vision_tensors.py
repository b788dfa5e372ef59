"""Names and shapes of the tensors of the vision tower and its projector."""

from __future__ import annotations

from collections.abc import Iterator

from hybrid_k2.vision_config import COLORS, VisionConfig

TOWER = "vision_tower"
BLOCKS = f"{TOWER}.encoder.blocks"
PROJECTOR = "mm_projector"


def vision_shapes(vision: VisionConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List every tensor as (name, shape), in the order in which they are computed with."""
    width, inner, merged = vision.hidden_size, vision.intermediate_size, vision.merged_size
    yield from _affine(f"{TOWER}.patch_embed.proj", width, COLORS, vision.patch_size, vision.patch_size)
    yield f"{TOWER}.patch_embed.pos_emb.weight", (vision.grid_rows, vision.grid_columns, width)
    for block in range(vision.num_hidden_layers):
        prefix = f"{BLOCKS}.{block}"
        yield from _affine(f"{prefix}.norm0", width)
        yield from _affine(f"{prefix}.wqkv", 3 * width, width)
        yield from _affine(f"{prefix}.wo", width, width)
        yield from _affine(f"{prefix}.norm1", width)
        yield from _affine(f"{prefix}.mlp.fc0", inner, width)
        yield from _affine(f"{prefix}.mlp.fc1", width, inner)
    yield from _affine(f"{TOWER}.encoder.final_layernorm", width)
    yield from _affine(f"{PROJECTOR}.pre_norm", width)
    yield from _affine(f"{PROJECTOR}.proj.0", merged, merged)
    yield from _affine(f"{PROJECTOR}.proj.2", vision.text_hidden_size, merged)


def _affine(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]

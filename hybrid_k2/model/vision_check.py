"""Compare what a GPU makes of an image with a reference, before it serves; see `self_check.py`."""

from __future__ import annotations

import logging
import random

import numpy as np
import torch

from hybrid_k2.checkpoint import VISION, Checkpoint
from hybrid_k2.errors import EngineError
from hybrid_k2.model.rounding import ROUNDING, Difference, combined, difference, shake
from hybrid_k2.model.vision import VisionModel
from hybrid_k2.model.vision_loading import VisionLoader
from hybrid_k2.placement import Plan
from hybrid_k2.placement.memories import HOST
from hybrid_k2.protocol import Image, ImageFormat
from hybrid_k2.vision_config import MERGE

log = logging.getLogger("hybrid_k2")

TOKENS = (3, 4)  # rows and columns of the image

_HINT = (
    "what was loaded does not compute what the checkpoint says: load again, update driver and torch, or write "
    "{what: vision, on: host}; with self_check: off in the rules it is served all the same"
)


def check_vision(model: VisionModel, checkpoint: Checkpoint, plan: Plan) -> None:
    """Check a vision tower on a GPU, unless the rules say that nothing is checked.

    Memory: two blocks and the projector in fp32, 0.4 GB at the size of K2.6.
    Raises: EngineError if the tower fails or disagrees; CheckpointError.
    """
    placement = plan.where(VISION)
    if placement.memory == HOST or not plan.rules.self_check:
        return
    try:
        found = vision_difference(model, checkpoint, placement.dtype)
    except RuntimeError as error:  # torch's, of a kernel that fails
        raise EngineError(f"self-check: vision on {placement.device}: {error}", hint=_HINT) from error
    if not found.within:
        raise EngineError(
            f"self-check: vision on {placement.device}: expected to differ from the reference by at most "
            f"{found.bound:.1e} of a row, got {found.error:.1e}",
            hint=_HINT,
        )
    log.info("self-check: vision agrees with the reference, within %.0f %% of its bound", 100 * found.share)


def vision_difference(model: VisionModel, checkpoint: Checkpoint, dtype: str) -> Difference:
    """Encode noise by the first block and another by chance, and by plain fp32 from the checkpoint's own numbers."""
    config, count = model.config, len(model.blocks)
    blocks = [0, random.randrange(1, count)] if count > 1 else [0]
    image = _noise(config.patch_size)
    reference = VisionLoader(checkpoint, HOST, torch.float32, _ignore).model(config, blocks, torch.float32)
    got = model.with_blocks(blocks).encode(image).float().cpu()
    expected = reference.encode(image)
    _shake(reference, combined(ROUNDING[dtype], ROUNDING["bf16"]))  # what it gives may be bf16, too
    return difference(got, expected, reference.encode(image))


def _noise(patch_size: int) -> Image:
    height, width = (tokens * MERGE * patch_size for tokens in TOKENS)
    pixels = np.frombuffer(random.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
    return Image(pixels, ImageFormat(patch_size=patch_size))


def _shake(model: VisionModel, amplitude: float) -> None:
    source = torch.Generator().manual_seed(random.getrandbits(60))
    parts: list[object] = [model.positions.flatten(0, 1), model.embed, model.final_norm, model.projector]
    for part in [*parts, *model.blocks]:
        shake(part, amplitude, source)


def _ignore(nbytes: int) -> None:
    """Report nothing: what is read here was counted when it was loaded."""

"""Read the vision tower and its projector from a checkpoint: to the device and in the dtype that the plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hybrid_k2.checkpoint import VISION, Checkpoint
from hybrid_k2.checkpoint.vision_tensors import BLOCKS, PROJECTOR, TOWER
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import CheckpointError
from hybrid_k2.host.cpu import cpu_flags
from hybrid_k2.model.devices import torch_dtype
from hybrid_k2.model.part_loading import place
from hybrid_k2.model.vision import Affine, Block, LayerNorm, Projector, VisionModel
from hybrid_k2.placement import Plan
from hybrid_k2.placement.memories import HOST, memory_of
from hybrid_k2.vision_config import VisionConfig

BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # with either, torch's products of bf16 are faster than those of fp32


def load_vision_model(
    checkpoint: Checkpoint, config: ModelConfig, plan: Plan, count: Callable[[int], None]
) -> VisionModel | None:
    """Load the vision tower as the plan says; None for a model that reads text only.

    Effects: calls `count` with the bytes on disk of each tensor.
    Raises: CheckpointError naming tensor and file, also for a weight that is not finite; MemoryBudgetError;
    HardwareError.
    """
    if config.vision is None:
        return None
    placement = plan.where(VISION)
    loader = VisionLoader(checkpoint, placement.device, torch_dtype(placement.dtype), count)
    return loader.model(config.vision, range(config.vision.num_hidden_layers), torch_dtype(plan.activation_dtype))


class VisionLoader:
    """Read tensors to a device in a dtype, and put them together; names are those of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: torch.dtype, count: Callable[[int], None]) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.count = count
        self.product_dtype = product_dtype(device, dtype)

    def model(self, config: VisionConfig, blocks: Iterable[int], features_dtype: torch.dtype) -> VisionModel:
        """Load the tower with these of its blocks."""
        return VisionModel(
            config,
            embed=self.affine(f"{TOWER}.patch_embed.proj"),
            positions=self.tensor(f"{TOWER}.patch_embed.pos_emb.weight"),
            blocks=[self.block(f"{BLOCKS}.{block}") for block in blocks],
            final_norm=self.norm(f"{TOWER}.encoder.final_layernorm"),
            projector=Projector(
                LayerNorm(*self.pair(f"{PROJECTOR}.pre_norm"), config.projector_norm_eps),
                self.affine(f"{PROJECTOR}.proj.0"),
                self.affine(f"{PROJECTOR}.proj.2"),
            ),
            features_dtype=features_dtype,
        )

    def block(self, name: str) -> Block:
        return Block(
            norm0=self.norm(f"{name}.norm0"),
            wqkv=self.affine(f"{name}.wqkv"),
            wo=self.affine(f"{name}.wo"),
            norm1=self.norm(f"{name}.norm1"),
            fc0=self.affine(f"{name}.mlp.fc0"),
            fc1=self.affine(f"{name}.mlp.fc1"),
        )

    def affine(self, name: str) -> Affine:
        """Load a linear layer; the patches' convolution is one, too, for patches do not overlap."""
        weight, bias = self.pair(name)
        return Affine(weight.flatten(1), bias, self.product_dtype)

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(*self.pair(name))

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")

    def tensor(self, name: str) -> Tensor:
        info = self.checkpoint.info(name)
        stored = self.checkpoint.read(name)
        if not bool(stored.isfinite().all()):
            raise CheckpointError(f"{name}: expected finite numbers, got NaN or infinity (in {info.file.name})")
        placed = place(name, self.device, self.dtype, stored)
        self.count(info.nbytes)
        return placed


def product_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """Choose what products are computed in: weights are widened where the CPU would only imitate bf16."""
    if memory_of(device) == HOST and not BF16_FLAGS & cpu_flags():
        return torch.float32
    return dtype

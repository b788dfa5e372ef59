"""One routed expert on disk: where its tensors lie, for a backend that reads them itself, or read as tensors."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_k2.checkpoint.reader import Checkpoint
from hybrid_k2.checkpoint.shard import TensorInfo
from hybrid_k2.checkpoint.tensors import ExpertWeights, expert_prefix, read_expert
from hybrid_k2.config import ModelConfig

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class StoredExpert:
    """Stand for one routed expert of an open checkpoint."""

    checkpoint: Checkpoint
    config: ModelConfig
    layer: int
    expert: int

    @property
    def prefix(self) -> str:
        """What stands in front of `.gate_proj` and its like."""
        return expert_prefix(self.config, self.layer, self.expert)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(self.checkpoint.linear_bytes(f"{self.prefix}.{projection}") for projection in PROJECTIONS)

    def read(self) -> ExpertWeights:
        """Read it into fresh memory. Raises: CheckpointError naming tensor and file."""
        return read_expert(self.checkpoint, self.config, self.layer, self.expert)

    def packed_infos(self) -> list[TensorInfo]:
        """Locate words and scales of gate, up and down, in this order.

        Raises: CheckpointError naming tensor and file, also for a matrix that is not INT4.
        """
        return [info for part in PROJECTIONS for info in self.checkpoint.packed_infos(f"{self.prefix}.{part}")]

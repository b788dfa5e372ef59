"""What is on disk: the index, the safetensors files, the INT4 format, and the tensors that the model needs."""

from hybrid_k2.checkpoint.int4 import (
    GROUP,
    PackedWeight,
    dequantize_int4,
    pack_int4,
    quantize_int4,
    unpack_int4,
)
from hybrid_k2.checkpoint.reader import Checkpoint
from hybrid_k2.checkpoint.resolve import resolve_checkpoint, resolve_configuration
from hybrid_k2.checkpoint.shard import TensorInfo
from hybrid_k2.checkpoint.stored import StoredExpert
from hybrid_k2.checkpoint.tensors import (
    VISION,
    ExpertWeights,
    TensorSpec,
    check_checkpoint,
    expected_tensors,
    expert_prefix,
    experts_packed,
    planned_packed,
    read_expert,
    vision_tensors,
)

__all__ = [
    "GROUP",
    "VISION",
    "Checkpoint",
    "ExpertWeights",
    "PackedWeight",
    "StoredExpert",
    "TensorInfo",
    "TensorSpec",
    "check_checkpoint",
    "dequantize_int4",
    "expected_tensors",
    "expert_prefix",
    "experts_packed",
    "pack_int4",
    "planned_packed",
    "quantize_int4",
    "read_expert",
    "resolve_checkpoint",
    "resolve_configuration",
    "unpack_int4",
    "vision_tensors",
]

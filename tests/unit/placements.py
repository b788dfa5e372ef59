"""Models and machines for the tests of placement."""

from __future__ import annotations

from typing import Any

from hybrid_k2.config import ModelConfig
from hybrid_k2.placement import Gpu, Machine

GIB = 1 << 30

# The sizes of Kimi K2.6.
K2_6 = ModelConfig(
    model_type="kimi_k25",
    vocab_size=163840,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=64,
    n_shared_experts=1,
    n_routed_experts=384,
    num_experts_per_tok=8,
    first_k_dense_replace=1,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    routed_scaling_factor=2.827,
    rms_norm_eps=1e-5,
    rope_theta=50000.0,
    rope_scaling=None,
    norm_topk_prob=True,
    max_position_embeddings=262144,
    bos_token_id=163584,
    pad_token_id=163839,
    eos_token_ids=(163586,),
    tensor_prefix="language_model.",
    has_vision=True,
)

_SMALL: dict[str, Any] = {
    **vars(K2_6),
    "model_type": "kimi_k2",
    "tensor_prefix": "",
    "has_vision": False,
    "vocab_size": 512,
    "hidden_size": 160,
    "intermediate_size": 224,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 3,
    "n_routed_experts": 24,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 2,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 100_000,
}


def small_config(**overrides: Any) -> ModelConfig:
    """Make a text-only model with odd sizes: layers 0 and 1 dense, 2 to 6 with experts."""
    return ModelConfig(**(_SMALL | overrides))


def machine(host_gib: float = 768.0, *gpu_gib: float, cores: int = 16, note: str = "no NVIDIA driver") -> Machine:
    """Describe a machine with so much free host memory and GPUs of these sizes."""
    gpus = tuple(Gpu(index, "Test GPU", int(size * GIB)) for index, size in enumerate(gpu_gib))
    memory = int(host_gib * GIB)
    return Machine(memory, memory, cores, gpus, "" if gpus else note)

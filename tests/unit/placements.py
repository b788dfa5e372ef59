"""Models, machines and rules for the tests of placement."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import RulesError
from hybrid_k2.placement import Gpu, Machine, Plan, make_plan, parse_rules
from hybrid_k2.vision_config import VisionConfig

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
    vision=VisionConfig(
        patch_size=14,
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        grid_rows=64,
        grid_columns=64,
        text_hidden_size=7168,
        projector_norm_eps=1e-5,
    ),
)

# Odd sizes: one head of 12 columns, and a learned grid that is no square.
SMALL_VISION = VisionConfig(
    patch_size=6,
    hidden_size=12,
    intermediate_size=17,
    num_hidden_layers=3,
    num_attention_heads=1,
    grid_rows=5,
    grid_columns=7,
    text_hidden_size=160,
    projector_norm_eps=1e-5,
)
_SMALL: dict[str, Any] = {
    **vars(K2_6),
    "model_type": "kimi_k2",
    "tensor_prefix": "",
    "vision": None,
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


HOST = {
    "embedding": "bf16",
    "attention": "bf16",
    "dense_mlp": "bf16",
    "shared_experts": "bf16",
    "routed_experts": "int4",
    "lm_head": "bf16",
}
HEAD = "version: 1\ndevices: {gpu: cuda:0}\nplace:\n"  # the first rule stands on line 4


def rules_text(*lines: str, tail: str = "") -> str:
    """Write rules from `what on key: value` lines; groups that no line names go to the host."""
    named = {line.split()[0] for line in lines}
    rest = [f"{what} host" for what in HOST if what not in named]
    words = [line.split(" ", 2) for line in [*lines, *rest]]
    rows = [f"  - {{what: {w[0]}, on: {w[1]}{', ' + w[2] if len(w) > 2 else ''}}}\n" for w in words]
    return HEAD + "".join(rows) + tail


def plan_of(
    *lines: str, tail: str = "", config: ModelConfig | None = None, on: Any = None, packed: bool = True
) -> Plan:
    """Plan these rules, of a small model on a machine with one GPU unless others are given."""
    rules = parse_rules(rules_text(*lines, tail=tail), "x.yaml")
    return make_plan(rules, config or small_config(), on or machine(64, 24), experts_packed=packed)


def refusal(*lines: str, **options: Any) -> RulesError:
    """Return the error of rules that are refused."""
    with pytest.raises(RulesError) as caught:
        plan_of(*lines, **options)
    return caught.value

"""The tensor groups that rules place, and their exact sizes from the model's shapes.

embedding        embed_tokens                                       no layers
attention        input norm, MLA projections, latent norms          every layer
router           post-attention norm, gate, correction bias         MoE layers
dense_mlp        post-attention norm, gate/up/down                  dense layers
shared_experts   gate/up/down of the shared experts                 MoE layers
routed_experts   gate/up/down of all routed experts                 MoE layers
lm_head          final norm, lm_head                                no layers
vision           vision tower and projector                         no layers
"""

from __future__ import annotations

from hybrid_k2.config import ModelConfig
from hybrid_k2.vision_config import VisionConfig

GROUPS = (
    "embedding",
    "attention",
    "router",
    "dense_mlp",
    "shared_experts",
    "routed_experts",
    "lm_head",
    "vision",
)
LAYERED_GROUPS = ("attention", "router", "dense_mlp", "shared_experts", "routed_experts")

# Bytes of 32 weights, so that INT4 with its scale stays an integer: 16 bytes of nibbles and 2 of scale. The packed
# host layout (L32) holds the same bytes in another order. INT8 has 32 bytes of values and 2 of scale.
_BYTES_PER_32 = {"fp32": 128, "bf16": 64, "int8": 34, "int4": 18}
INT8_GROUPS = ("attention", "dense_mlp", "shared_experts", "lm_head")  # with matrices that may be int8, or fp8 on a GPU
_FP8_SCALE_BYTES = 4  # of each row of an fp8 matrix
_BLOCK = 32  # rows and inputs of a block of an int8 matrix
_BIAS_BYTES = 4  # e_score_correction_bias is FP32 whatever the group's dtype


def group_layers(config: ModelConfig, what: str) -> range | None:
    """Find the layers that have this group; None for groups outside the layers."""
    if what == "attention":
        return range(config.num_hidden_layers)
    if what == "dense_mlp":
        return config.dense_layers
    if what == "shared_experts" and not config.n_shared_experts:
        return range(0)
    return config.moe_layers if what in LAYERED_GROUPS else None


def expert_parameters(config: ModelConfig) -> int:
    """Count the weights of one routed expert (gate, up and down)."""
    return 3 * config.moe_intermediate_size * config.hidden_size


def group_parameters(config: ModelConfig, what: str) -> int:
    """Count the weights of a group, in one layer if it has layers; the router's FP32 bias is not among them."""
    hidden = config.hidden_size
    if what == "attention":
        return _attention_parameters(config)
    if what == "vision":
        return vision_parameters(config.vision) if config.vision is not None else 0
    return {
        "embedding": config.vocab_size * hidden,
        "router": config.n_routed_experts * hidden + hidden,
        "dense_mlp": 3 * config.intermediate_size * hidden + hidden,
        "shared_experts": config.n_shared_experts * expert_parameters(config),
        "routed_experts": config.n_routed_experts * expert_parameters(config),
        "lm_head": config.vocab_size * hidden + hidden,
    }[what]


def _attention_parameters(config: ModelConfig) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads
    query = config.q_lora_rank * hidden + config.q_lora_rank + heads * config.qk_head_dim * config.q_lora_rank
    latent = config.latent_dim * hidden + config.kv_lora_rank
    expand = heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    output = hidden * heads * config.v_head_dim
    return hidden + query + latent + expand + output


def vision_parameters(vision: VisionConfig) -> int:
    """Count the weights of the vision tower and its projector."""
    width, inner, merged = vision.hidden_size, vision.intermediate_size, vision.merged_size
    norm = 2 * width
    attention = norm + _affine(3 * width, width) + _affine(width, width)
    mlp = norm + _affine(inner, width) + _affine(width, inner)
    embedding = _affine(width, vision.patch_values) + vision.grid_rows * vision.grid_columns * width
    projector = norm + _affine(merged, merged) + _affine(vision.text_hidden_size, merged)
    return embedding + vision.num_hidden_layers * (attention + mlp) + norm + projector


def _affine(outputs: int, inputs: int) -> int:
    return outputs * (inputs + 1)


def int8_matrices(config: ModelConfig, what: str) -> tuple[tuple[int, int], ...]:
    """List rows and inputs of the matrices that the dtypes int8 and fp8 quantise; the rest of the group stays bf16.

    The rest are norms, kv_b (attention multiplies with its transpose too), and matrices that are not whole blocks of
    32 rows by 32 inputs.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    if what == "attention":
        matrices = [
            (config.q_lora_rank, hidden),
            (heads * config.qk_head_dim, config.q_lora_rank),
            (config.latent_dim, hidden),
            (hidden, heads * config.v_head_dim),
        ]
    elif what == "lm_head":
        matrices = [(config.vocab_size, hidden)]
    else:
        shared = config.n_shared_experts * config.moe_intermediate_size
        inner = config.intermediate_size if what == "dense_mlp" else shared
        matrices = [(inner, hidden), (inner, hidden), (hidden, inner)]
    return tuple(shape for shape in matrices if all(size % _BLOCK == 0 for size in shape))


def weight_bytes(parameters: int, dtype: str) -> int:
    """Return the bytes of so many weights; INT4 counts its scales."""
    return -(-parameters * _BYTES_PER_32[dtype] // 32)


def group_bytes(config: ModelConfig, what: str, dtype: str) -> int:
    """Return the bytes of a group, in one layer if it has layers."""
    parameters = group_parameters(config, what)
    if dtype in ("int8", "fp8"):
        matrices = int8_matrices(config, what)
        quantised = sum(rows * inputs for rows, inputs in matrices)
        scales = sum(rows for rows, _ in matrices) * _FP8_SCALE_BYTES
        narrow = weight_bytes(quantised, "int8") if dtype == "int8" else quantised + scales
        return narrow + weight_bytes(parameters - quantised, "bf16")
    bias = config.n_routed_experts * _BIAS_BYTES if what == "router" else 0
    return weight_bytes(parameters, dtype) + bias


def decoded_parameters(config: ModelConfig, what: str) -> int:
    """Count the weights of a group (per layer) that one token meets: one embedding row, the chosen experts.

    Images are encoded before the first token is decoded.
    """
    if what == "vision":
        return 0
    if what == "embedding":
        return config.hidden_size
    if what == "routed_experts":
        return config.num_experts_per_tok * expert_parameters(config)
    return group_parameters(config, what)


def decoded_bytes(config: ModelConfig, what: str, dtype: str) -> int:
    """Return the bytes of a group (per layer) that decoding one token reads."""
    if what in ("embedding", "routed_experts", "vision"):
        return weight_bytes(decoded_parameters(config, what), dtype)
    return group_bytes(config, what, dtype)


def latent_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Return the bytes that the KV cache holds for one token over all layers."""
    return config.num_hidden_layers * weight_bytes(config.latent_dim, dtype)

"""Sizes in the plan: exact to the byte, of the published model and of odd ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.checkpoint.tensors import expected_tensors
from hybrid_k2.config import ModelConfig
from hybrid_k2.placement import make_plan, parse_rules, shipped_rules
from hybrid_k2.placement.groups import decoded_bytes, expert_parameters, group_bytes, group_parameters
from hybrid_k2.vision_config import VisionConfig
from tests.unit.placements import GIB, HOST, K2_6, machine, plan_of, rules_text, small_config


def test_the_published_sizes_of_k2_6() -> None:
    parameters = {what: group_parameters(K2_6, what) for what in (*HOST, "router")}
    expert_bytes = group_bytes(K2_6, "routed_experts", "int4")
    shape_bytes = 3 * 2 * 4  # weight_shape of gate, up and down on disk; memory does not hold it
    assert expert_bytes // 384 + shape_bytes == 24_772_632
    assert round(expert_bytes / GIB, 3) == 8.859
    assert round(60 * expert_bytes / GIB, 2) == 531.56
    counts = {
        "attention": 61 * parameters["attention"] + 60 * 7168 + 7168 + 7168,  # with all other norms, as published
        "shared": 60 * parameters["shared_experts"],
        "embed and lm_head": parameters["embedding"] + parameters["lm_head"] - 7168,
        "dense layer": parameters["dense_mlp"] - 7168,
        "router": 60 * (parameters["router"] - 7168),
        "routed": 60 * parameters["routed_experts"],
    }
    assert {name: round(count / 1e9, 3) for name, count in counts.items()} == {
        "attention": 6.169, "shared": 2.642, "embed and lm_head": 2.349, "dense layer": 0.396, "router": 0.165,
        "routed": 1014.686,
    }  # fmt: skip
    vision = vision_parameters()
    assert group_parameters(K2_6, "vision") == vision
    assert round(2 * vision / 1e9, 2) == 0.94
    assert round((sum(counts.values()) - counts["routed"] + vision) / 1e9, 3) == 12.193
    assert round(2 * (sum(counts.values()) - counts["routed"] + vision) / GIB, 2) == 22.71
    bias_bytes = 60 * 384 * 4
    disk = 2 * (sum(counts.values()) - counts["routed"] + vision) + bias_bytes
    assert disk + 60 * (expert_bytes + 384 * shape_bytes) == 595_148_192_736


def test_the_sizes_here_are_those_of_the_published_configuration(kimi_data: Path) -> None:
    published = ModelConfig.load(kimi_data)
    assert replace(published, rope_scaling=None) == K2_6


def vision_parameters() -> int:
    """Count vision tower and projector from their shapes."""
    block = 4 * 1152 + 3456 * 1152 + 3456 + 1152 * 1152 + 1152 + 2 * 4304 * 1152 + 4304 + 1152
    tower = 1152 * 3 * 14 * 14 + 1152 + 64 * 64 * 1152 + 27 * block + 2 * 1152
    projector = 2 * 1152 + 4608 * 4608 + 4608 + 7168 * 4608 + 7168
    return tower + projector


def test_bytes_per_decoded_token_of_k2_6() -> None:
    experts = 60 * decoded_bytes(K2_6, "routed_experts", "int4")
    assert round(experts / 1e9, 2) == 11.89
    # Published: about 31.7 billion active parameters without the embedding, 8 experts of 60 layers among them.
    dense = make_plan(shipped_rules("host"), K2_6, machine(768)).bytes_per_token - experts
    assert decoded_bytes(K2_6, "vision", "bf16") == 0
    active = (dense - 2 * 7168 - 60 * 384 * 4) // 2 + 8 * 60 * expert_parameters(K2_6)
    assert round(active / 1e9, 1) == 31.7
    on_card = make_plan(shipped_rules("gpu"), K2_6, machine(768, 80))
    assert on_card.bytes_per_token_on("host") == experts + 7168 * 2  # and a row of the embedding
    assert on_card.bytes_per_token_on("cuda:0") == on_card.bytes_per_token - experts - 7168 * 2
    # 100 GB/s over 11.89 GB
    assert "\none sequence: at most 8.4 tokens/s for each 100 GB/s of host memory\n" in on_card.table() + "\n"
    wide = parse_rules(rules_text("router host dtype: fp32"))
    in_fp32 = make_plan(wide, K2_6, machine(768)).bytes_per_token
    assert in_fp32 - experts - dense == 2 * 60 * group_parameters(K2_6, "router")


_SIZES = st.integers(1, 9)


@given(
    _SIZES, _SIZES, _SIZES, _SIZES, _SIZES, _SIZES, st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans()
)
def test_sizes_are_those_of_the_tensors(
    a: int, b: int, c: int, d: int, e: int, f: int, dense: int, moe: int, packed: bool, sees: bool
) -> None:
    """The list of tensors that the checkpoint reader expects is the independent witness."""
    vision = VisionConfig(
        patch_size=a, hidden_size=4 * b * c, intermediate_size=d, num_hidden_layers=e, num_attention_heads=c,
        grid_rows=f, grid_columns=a + 1, text_hidden_size=32 * a, projector_norm_eps=1e-5,
    )  # fmt: skip
    config = small_config(
        vision=vision if sees else None,
        hidden_size=32 * a, moe_intermediate_size=32 * b, intermediate_size=17 * c, num_attention_heads=d,
        q_lora_rank=5 * e, kv_lora_rank=7 * f, qk_nope_head_dim=3 * a, qk_rope_head_dim=2 * b, v_head_dim=5 * c,
        vocab_size=100 + d, n_routed_experts=e + f, num_experts_per_tok=e, n_shared_experts=1 + f % 2,
        first_k_dense_replace=dense, num_hidden_layers=dense + moe + (not dense + moe),
    )  # fmt: skip
    plan = plan_of(config=config, packed=packed)
    expected: Counter[tuple[str, int | None]] = Counter()
    for tensor in expected_tensors(config, lambda name: packed and ".mlp.experts." in name):
        values = 1
        for size in tensor.shape:
            values *= size
        if tensor.name.endswith("e_score_correction_bias"):
            width = 4
        elif tensor.name.endswith("weight_shape"):
            width = 0
        else:
            width = 4 if tensor.dtypes == ("I32",) or (tensor.what == "router" and not packed) else 2
        expected[tensor.what, tensor.layer] += width * values
    found: Counter[tuple[str, int | None]] = Counter()
    for row in plan.rows:
        for layer in row.layers or (None,):
            found[row.what, layer] += row.nbytes // len(row.layers or (None,))
    assert found == +expected
    overheads = sum(one.nbytes for one in plan.overheads)
    assert (overheads > 0) == sees
    assert plan.bytes_on("host") == expected.total() + plan.kv_cache.nbytes + overheads


def test_fp32_is_twice_bf16_and_the_bias_is_fp32_always() -> None:
    config = small_config()
    for what in HOST:
        if what != "routed_experts":
            assert group_bytes(config, what, "fp32") == 2 * group_bytes(config, what, "bf16")
    assert group_bytes(config, "router", "fp32") - group_bytes(config, "router", "bf16") == 2 * 25 * 160
    assert group_bytes(config, "router", "bf16") == 2 * 25 * 160 + 4 * 24


def test_int8_counts_8_5_bits_for_the_matrices_it_quantises() -> None:
    hidden, head = 7168, 64 * 192
    attention = 1536 * hidden + head * 1536 + 576 * hidden + hidden * 64 * 128
    rest = 2 * hidden + 1536 + 512 + 64 * 256 * 512 - hidden  # input norm, latent norms, kv_b
    assert group_bytes(K2_6, "attention", "int8") == attention * 34 // 32 + 2 * rest
    assert group_bytes(K2_6, "shared_experts", "int8") == 3 * 2048 * hidden * 34 // 32
    assert group_bytes(K2_6, "dense_mlp", "int8") == 3 * 18432 * hidden * 34 // 32 + 2 * hidden
    assert group_bytes(K2_6, "lm_head", "int8") == 163840 * hidden * 34 // 32 + 2 * hidden


def test_int8_leaves_matrices_of_other_sizes_in_bf16() -> None:
    config = small_config(moe_intermediate_size=96, intermediate_size=224, vocab_size=500)
    assert group_bytes(config, "shared_experts", "int8") == 3 * 96 * 160 * 34 // 32
    assert group_bytes(config, "lm_head", "int8") == group_bytes(config, "lm_head", "bf16")
    # q_a [48, 160], q_b [72, 48], kv_a [40, 160] and o [160, 36] are not whole blocks of 32.
    assert group_bytes(config, "attention", "int8") == group_bytes(config, "attention", "bf16")

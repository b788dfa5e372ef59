"""The plan: exact sizes, complete and unambiguous placement, the KV cache, and refusal before anything is loaded."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.checkpoint.tensors import expected_tensors
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import HardwareError, MemoryBudgetError, RulesError
from hybrid_k2.host.threads import NodeThreads
from hybrid_k2.host.topology import HostNode
from hybrid_k2.placement import Machine, Placement, Plan, make_plan, parse_rules, shipped_rules
from hybrid_k2.placement.budget import reserve_bytes
from hybrid_k2.placement.groups import decoded_bytes, expert_parameters, group_bytes, group_parameters
from hybrid_k2.placement.sizes import format_bytes
from tests.conftest import REPO
from tests.unit.placements import GIB, K2_6, machine, small_config

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
    rules = parse_rules(rules_text(*lines, tail=tail), "x.yaml")
    return make_plan(rules, config or small_config(), on or machine(64, 24), experts_packed=packed)


def refusal(*lines: str, **options: Any) -> RulesError:
    with pytest.raises(RulesError) as caught:
        plan_of(*lines, **options)
    return caught.value


# Sizes


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
    assert round((sum(counts.values()) - counts["routed"] + vision) / 1e9, 3) == 12.193
    assert round(2 * (sum(counts.values()) - counts["routed"] + vision) / GIB, 2) == 22.71
    bias_bytes = 60 * 384 * 4
    disk = 2 * (sum(counts.values()) - counts["routed"] + vision) + bias_bytes
    assert disk + 60 * (expert_bytes + 384 * shape_bytes) == 595_148_192_736


def test_the_sizes_here_are_those_of_the_published_configuration(kimi_data: Path) -> None:
    published = ModelConfig.load(kimi_data)
    assert replace(published, rope_scaling=None) == K2_6


def vision_parameters() -> int:
    """Count vision tower and projector from their shapes; the plan leaves them out, the published totals do not."""
    block = 4 * 1152 + 3456 * 1152 + 3456 + 1152 * 1152 + 1152 + 2 * 4304 * 1152 + 4304 + 1152
    tower = 1152 * 3 * 14 * 14 + 1152 + 64 * 64 * 1152 + 27 * block + 2 * 1152
    projector = 2 * 1152 + 4608 * 4608 + 4608 + 7168 * 4608 + 7168
    return tower + projector


def test_bytes_per_decoded_token_of_k2_6() -> None:
    experts = 60 * decoded_bytes(K2_6, "routed_experts", "int4")
    assert round(experts / 1e9, 2) == 11.89
    # Published: about 31.7 billion active parameters without the embedding, 8 experts of 60 layers among them.
    dense = make_plan(parse_rules(rules_text("router host dtype: bf16")), K2_6, machine(768)).bytes_per_token - experts
    active = (dense - 2 * 7168 - 60 * 384 * 4) // 2 + 8 * 60 * expert_parameters(K2_6)
    assert round(active / 1e9, 1) == 31.7
    in_fp32 = make_plan(shipped_rules("host"), K2_6, machine(768)).bytes_per_token
    assert in_fp32 - experts - dense == 2 * 60 * group_parameters(K2_6, "router")


_SIZES = st.integers(1, 9)


@given(_SIZES, _SIZES, _SIZES, _SIZES, _SIZES, _SIZES, st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_sizes_are_those_of_the_tensors(
    a: int, b: int, c: int, d: int, e: int, f: int, dense: int, moe: int, packed: bool
) -> None:
    """The list of tensors that the checkpoint reader expects is the independent witness."""
    config = small_config(
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
            width = 4 if tensor.dtypes == ("I32",) or tensor.what == "router" else 2
        expected[tensor.what, tensor.layer] += width * values
    found: Counter[tuple[str, int | None]] = Counter()
    for row in plan.rows:
        for layer in row.layers or (None,):
            found[row.what, layer] += row.nbytes // len(row.layers or (None,))
    assert found == +expected
    assert plan.bytes_on("host") == expected.total() + plan.kv_cache.nbytes


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


# Placement


def test_each_layer_goes_where_its_rule_says() -> None:
    plan = plan_of(
        "attention gpu layers: [0..2, 5], dtype: fp32",
        "attention gpu layers: [3, 4, 6]",
        "dense_mlp gpu layers: 1",
        "dense_mlp host layers: 0",
        "shared_experts gpu",
        tail="kv_cache: {on: gpu}\n",
    )
    assert [plan.where("attention", layer).dtype for layer in range(7)] == ["fp32"] * 3 + ["bf16"] * 2 + [
        "fp32",
        "bf16",
    ]
    assert plan.where("dense_mlp", 0) == Placement("host", "bf16")
    assert plan.where("dense_mlp", 1) == Placement("cuda:0", "bf16")
    assert plan.where("embedding") == Placement("host", "bf16")
    assert plan.where("routed_experts", 6) == Placement("host", "int4")
    for what, layer in (("dense_mlp", 2), ("routed_experts", 0), ("router", 1), ("attention", 7), ("vision", None)):
        with pytest.raises(KeyError):
            plan.where(what, layer)
    with pytest.raises(KeyError):
        plan.where("embedding", 0)


def test_an_unnamed_router_follows_its_attention_and_stays_fp32() -> None:
    on_gpu = plan_of("attention gpu")
    assert {on_gpu.where("router", layer) for layer in range(2, 7)} == {Placement("cuda:0", "fp32")}
    named = plan_of("attention gpu", "router host layers: 2..3, dtype: bf16", "router gpu layers: 4..6")
    assert named.where("router", 3) == Placement("host", "bf16")
    assert named.where("router", 4) == Placement("cuda:0", "fp32")
    partly = plan_of("attention gpu", "router host layers: 4")
    assert [partly.where("router", layer).device for layer in range(2, 7)] == ["cuda:0"] * 2 + ["host"] + ["cuda:0"] * 2


def test_a_range_may_reach_over_layers_of_another_kind() -> None:
    plan = plan_of("shared_experts host layers: 0..6", "dense_mlp host layers: 0..6")
    assert next(row for row in plan.rows if row.what == "shared_experts").layer_text == "2..6"
    assert next(row for row in plan.rows if row.what == "dense_mlp").layer_text == "0..1"


def test_activations_are_fp32_on_the_host_and_where_a_group_of_the_residual_stream_is() -> None:
    gpu = machine(64, 24)
    assert plan_of().activation_dtype == "fp32", "everything on the host"
    assert plan_of("lm_head gpu").activation_dtype == "fp32", "the stream ends before the head"
    assert plan_of("dense_mlp gpu", on=gpu).activation_dtype == "bf16"
    assert plan_of("dense_mlp gpu", "router host dtype: fp32", on=gpu).activation_dtype == "bf16"
    assert plan_of("dense_mlp gpu", "shared_experts host dtype: fp32", on=gpu).activation_dtype == "fp32"


def test_auto_threads_are_the_cores_that_have_work() -> None:
    assert plan_of(on=machine(64, cores=5)).threads == 1, "a small model"
    kimi = make_plan(shipped_rules("host"), K2_6, machine(768, cores=5))
    assert kimi.threads == 5


def test_large_machines_leave_cores_to_the_interpreter_and_the_gpu() -> None:
    for cores, on_host, beside_gpu in ((3, 3, 3), (4, 4, 3), (15, 15, 14), (16, 15, 14), (64, 63, 62)):
        kimi = make_plan(shipped_rules("host"), K2_6, machine(768, cores=cores))
        assert kimi.threads == on_host
        kimi = make_plan(shipped_rules("gpu"), K2_6, machine(768, 80, cores=cores))
        assert kimi.threads == beside_gpu


def two_nodes(free_gib: int, **facts: object) -> Machine:
    """A server of two nodes with 8 cores each."""
    cores = tuple((core, core + 16) for core in range(16))
    nodes = tuple(HostNode(n, cores[8 * n : 8 * n + 8], free_gib * GIB) for n in (0, 1))
    return replace(machine(2 * free_gib, cores=16), core_cpus=cores, nodes=nodes, **facts)  # type: ignore[arg-type]


def test_threads_are_spread_over_the_nodes_of_the_machine() -> None:
    plan = make_plan(shipped_rules("host"), K2_6, two_nodes(384))
    cores = two_nodes(384).core_cpus
    assert plan.nodes == (NodeThreads(7, 0, cores[1:8]), NodeThreads(8, 1, cores[8:]))
    assert "experts: exact, 15 threads on 2 NUMA nodes; activations" in plan.table()
    assert plan.notes == make_plan(shipped_rules("host"), K2_6, machine(768)).notes
    quota = make_plan(shipped_rules("host"), K2_6, two_nodes(384, cpu_quota=True))
    assert [set(node.cpus) for node in quota.nodes] == [{tuple(sum(cores[:8], ()))}, {tuple(sum(cores[8:], ()))}]


def test_nodes_are_left_together_where_one_lacks_the_memory() -> None:
    on = two_nodes(384)
    small = replace(on, nodes=(on.nodes[0], replace(on.nodes[1], free_bytes=200 * GIB)))
    plan = make_plan(shipped_rules("host"), K2_6, small)
    assert [(node.threads, node.node) for node in plan.nodes] == [(15, None)]
    assert plan.notes[-1] == (
        "numa: node 1 has 200.00 GiB free and its share of the routed experts is 265.78 GiB, so the nodes are not told "
        "apart (slower)"
    )


def test_a_kernel_that_moves_pages_is_noted() -> None:
    plan = make_plan(shipped_rules("host"), K2_6, two_nodes(384, numa_balancing=True))
    assert "kernel.numa_balancing is on" in plan.notes[-1]
    one = replace(machine(768), numa_balancing=True)
    assert not any("numa" in note for note in make_plan(shipped_rules("host"), K2_6, one).notes)


def test_numa_by_rule() -> None:
    def nodes(numa: str, on: Machine) -> tuple[NodeThreads, ...]:
        text = rules_text().replace("{gpu: cuda:0}", f"{{host: {{{numa}}}}}")
        return make_plan(parse_rules(text), K2_6, on).nodes

    assert nodes("numa: off", two_nodes(384)) == (NodeThreads(15),)
    assert nodes("numa: 3, threads: 7", two_nodes(384)) == (NodeThreads(2), NodeThreads(2), NodeThreads(3))
    assert nodes("numa: 4", machine(768, cores=2)) == (NodeThreads(1),) * 4
    assert "2 threads on 2 virtual nodes" in plan_of_numa(2).table()


def plan_of_numa(nodes: int) -> Plan:
    text = rules_text().replace("{gpu: cuda:0}", f"{{host: {{numa: {nodes}}}}}")
    return make_plan(parse_rules(text), small_config(), machine(64))


def test_threads_numerics_and_chunks() -> None:
    text = rules_text().replace("{gpu: cuda:0}", "{host: {threads: 3}}")
    plan = make_plan(parse_rules(text), small_config(), machine(64, cores=5))
    assert (plan.threads, plan.numerics, plan.chunk_tokens) == (3, "exact", 512)
    plan = plan_of(tail="numerics: reference\nprefill: {chunk_tokens: 100}\n")
    assert (plan.numerics, plan.chunk_tokens) == ("reference", 100)
    assert plan_of(tail="kv_cache: {tokens: 70}\n").chunk_tokens == 70


def test_the_cost_of_fast_is_said() -> None:
    plan = plan_of(tail="numerics: fast\n")
    assert plan.numerics == "fast"
    assert any("rounded to 8 bits, an error of 1 to 2e-2" in note for note in plan.notes)
    assert "note: numerics: fast" in plan.table()
    assert plan_of(packed=False, tail="numerics: fast\n").numerics == "reference"
    assert not any("fast" in note for note in plan_of().notes)


def test_the_cost_of_bf16_is_said() -> None:
    plan = plan_of(tail="numerics: bf16\n")
    assert (plan.numerics, plan.activation_dtype) == ("bf16", "fp32")
    assert any("rounded to bf16, an error of 2 to 3e-3" in note for note in plan.notes)
    plan = plan_of("dense_mlp gpu", on=machine(64, 64), tail="numerics: bf16\n")
    assert (plan.numerics, plan.activation_dtype) == ("bf16", "bf16")
    assert any("bit for bit" in note for note in plan.notes)
    assert plan_of(packed=False, tail="numerics: bf16\n").numerics == "reference"


def test_unpacked_experts_go_to_the_reference() -> None:
    plan = plan_of(packed=False)
    assert (plan.numerics, plan.where("routed_experts", 2).dtype) == ("reference", "bf16")
    assert any("unpacked" in note for note in plan.notes)
    plan = plan_of("attention host dtype: fp32", packed=False, tail="numerics: reference\n")
    assert plan.where("routed_experts", 2).dtype == "fp32"
    assert plan.notes == ()
    assert plan_of("routed_experts host dtype: fp32", packed=False).where("routed_experts", 2).dtype == "fp32"
    error = refusal("routed_experts host dtype: int4", packed=False)
    assert error.message == "x.yaml:4: place rule 1 (routed_experts): expected dtype bf16 or fp32, got int4"
    assert "unpacked" in (error.hint or "")
    error = refusal("routed_experts host dtype: bf16")
    assert error.message == "x.yaml:4: place rule 1 (routed_experts): expected dtype int4 (the checkpoint's), got bf16"


# Refusals of rules


def test_a_layer_outside_the_model() -> None:
    error = refusal("attention host layers: 0..6", "lm_head host", "routed_experts host layers: [2..4, 5..7]")
    assert error.message == (
        "x.yaml:6: place rule 3 (routed_experts, layers 2..4,5..7): expected layers 0..6 of this model, got 7"
    )
    assert "got 999999" in refusal("attention host layers: 0..999999").message


def test_a_rule_that_matches_nothing() -> None:
    error = refusal("lm_head host", "dense_mlp host layers: 5..6")
    assert error.message == (
        "x.yaml:5: place rule 2 (dense_mlp, layers 5..6): "
        "matches nothing: no such layer has dense_mlp (it is in layers 0..1)"
    )
    error = refusal("shared_experts host layers: 5", config=small_config(n_shared_experts=0))
    assert error.message.endswith("no such layer has shared_experts (the model has none)")


def test_two_rules_for_one_group_name_both_lines() -> None:
    error = refusal("attention host layers: 0..4", "lm_head host", "attention host layers: [6, 4..5]")
    assert error.message == (
        "x.yaml:6: place rule 3 (attention, layers 4..5,6): attention of layer 4 is already placed by rule 1 on line 4"
    )
    error = refusal("embedding host", "embedding gpu")
    assert error.message == "x.yaml:5: place rule 2 (embedding): embedding is already placed by rule 1 on line 4"


@pytest.mark.parametrize("what", HOST)
def test_a_group_without_a_rule(what: str) -> None:
    text = re.sub(f"  - {{what: {what}.*\n", "", rules_text())
    with pytest.raises(RulesError) as caught:
        make_plan(parse_rules(text, "x.yaml"), small_config(), machine())
    assert caught.value.message.startswith(f"x.yaml: place: expected a rule for every group, got none for {what}")
    assert what in (caught.value.hint or "")


def test_a_gap_between_layers() -> None:
    message = refusal("attention host layers: [0, 2..3, 6]").message
    assert message == "x.yaml: place: expected a rule for every group, got none for attention of layers 1,4..5"


def test_what_the_model_lacks_is_a_note() -> None:
    assert plan_of().notes == ()
    config = small_config(first_k_dense_replace=0, n_shared_experts=0)
    assert plan_of("vision host", config=config).notes == (
        "place rule 1 (vision): the model has no vision, the rule is idle",
        "place rule 4 (dense_mlp): the model has no dense_mlp, the rule is idle",
        "place rule 5 (shared_experts): the model has no shared_experts, the rule is idle",
    )
    dense_only = small_config(first_k_dense_replace=7)
    assert [note.split("(")[1].split(")")[0] for note in plan_of(config=dense_only).notes] == [
        "shared_experts", "routed_experts",
    ]  # fmt: skip


def test_vision_is_not_loaded_and_the_plan_says_so() -> None:
    config = small_config(model_type="kimi_k25", has_vision=True)
    for plan in (plan_of(config=config), plan_of("vision gpu", config=config)):
        assert plan.notes == ("vision: not loaded, this version reads and writes text only",)
        assert "vision" not in {row.what for row in plan.rows}
        assert "note: vision" in plan.table()


# The KV cache


def test_the_kv_cache_of_k2_6() -> None:
    plan = make_plan(shipped_rules("host"), K2_6, machine(768))
    cache = plan.kv_cache
    assert (cache.device, cache.dtype, cache.tokens, cache.page_tokens, cache.pages) == (
        "host",
        "bf16",
        65536,
        64,
        1024,
    )
    assert cache.nbytes == 70_272 * 65536
    rules = parse_rules(rules_text(tail="kv_cache: {tokens: 262144}\n"))
    assert make_plan(rules, K2_6, machine(768)).kv_cache.nbytes == 70_272 * 262_144


@given(st.integers(1, 100_000))
def test_explicit_tokens_are_kept_and_pages_are_whole(tokens: int) -> None:
    cache = plan_of(tail=f"kv_cache: {{tokens: {tokens}, dtype: fp32}}\n").kv_cache
    assert (cache.tokens, cache.dtype) == (tokens, "fp32")
    assert cache.pages == (tokens + 63) // 64
    assert cache.nbytes == cache.pages * 64 * 7 * 40 * 4


def test_automatic_tokens_take_a_quarter_of_what_is_free() -> None:
    assert plan_of().kv_cache.tokens == 65536
    assert plan_of(config=small_config(max_position_embeddings=1000)).kv_cache.tokens == 1000
    weights = sum(row.nbytes for row in plan_of().rows)
    page = 64 * 7 * 40 * 2
    for pages, tokens in ((100, 25 * 64), (99, 24 * 64), (4, 64), (3, 64)):
        limit = Fraction(weights + pages * page, 1 << 10)
        size = f"{float(limit):.6f}KiB"
        text = rules_text().replace("{gpu: cuda:0}", f"{{host: {{memory: {size}}}}}")
        plan = make_plan(parse_rules(text), small_config(), machine(64))
        assert plan.kv_cache.tokens == tokens
        assert plan.bytes_on("host") <= limit * 1024


def test_more_tokens_than_the_model_is_made_for() -> None:
    error = refusal(tail="kv_cache:\n  dtype: bf16\n  tokens: 100001\n")
    assert error.message == "x.yaml:12: kv_cache: tokens: expected at most 100000 (the model's), got 100001"


def test_the_kv_cache_stands_with_all_attention() -> None:
    assert plan_of("attention gpu").kv_cache.device == "cuda:0"
    error = refusal("attention gpu", tail="kv_cache: {on: host}\n")
    assert error.message == (
        "x.yaml:10: kv_cache: expected on the device of all attention (cuda:0 on line 4), got host"
    )
    error = refusal("attention host layers: 0..3", "attention gpu layers: 4..6", tail="kv_cache: {on: host}\n")
    assert "(cuda:0 on line 5), got host" in error.message
    assert (
        "(cuda:0 on line 5), got host" in refusal("attention host layers: 0..3", "attention gpu layers: 4..6").message
    )


# Devices and budgets


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(HardwareError) as caught:
        make_plan(shipped_rules("gpu"), K2_6, machine(768))
    line = (REPO / "rules" / "gpu.yaml").read_text().splitlines().index(
        "devices: {gpu: cuda:0, host: {memory: auto, threads: auto, numa: auto}}"
    )  # fmt: skip
    assert caught.value.message == (
        f"rules/gpu.yaml:{line + 1}: devices: gpu: expected cuda:0, found no GPU (no NVIDIA driver)"
    )
    assert "rules/host.yaml" in (caught.value.hint or "")
    text = rules_text("attention gpu").replace("cuda:0", "cuda:2")
    with pytest.raises(
        HardwareError, match=r"x.yaml:2: .*expected cuda:2, found cuda:0 \(Test GPU\), cuda:1 \(Test GPU\)"
    ):
        make_plan(parse_rules(text, "x.yaml"), small_config(), machine(64, 24, 24))
    assert plan_of(on=machine(64)).devices == ("host",)  # devices names a GPU that nothing uses


def test_a_plan_over_the_free_memory_is_refused_with_its_biggest_parts() -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        make_plan(shipped_rules("host"), K2_6, machine(256))
    message = caught.value.message
    assert message.startswith(
        "rules/host.yaml: host: expected a plan of at most 249.88 GiB (256.00 GiB free less 6.12 GiB"
    )
    assert "got 553.71 GiB; the biggest: routed_experts of layers 1..60 (line 9) 531.56 GiB, attention" in message


def test_a_plan_over_the_memory_of_the_rules_names_their_line() -> None:
    text = rules_text().replace("{gpu: cuda:0}", "\n  host:\n    memory: 100KiB")
    with pytest.raises(MemoryBudgetError, match=r"at most 100.00 KiB \(devices.host.memory on line 4\)") as caught:
        make_plan(parse_rules(text, "x.yaml"), small_config(), machine(64))
    assert "raise devices.host.memory" in (caught.value.hint or "")


def test_a_plan_over_the_gpu_names_it() -> None:
    lines = [f"{what} gpu" for what in HOST if what != "routed_experts"]
    with pytest.raises(MemoryBudgetError, match=r"x.yaml: cuda:0: .*the biggest: attention of layers 0..60") as caught:
        plan_of(*lines, config=K2_6, on=machine(768, 16))
    assert "GPU" in (caught.value.hint or "")
    explicit = "kv_cache: {on: gpu, tokens: 262144}\n"
    with pytest.raises(MemoryBudgetError, match=r"kv_cache of 262144 tokens \(line 10\) 17.16 GiB"):
        plan_of(*lines, config=K2_6, on=machine(768, 24), tail=explicit)


def test_the_budget_is_met_to_the_byte() -> None:
    plan = plan_of(tail="kv_cache: {tokens: 64}\n")
    for spare, fits in ((0, True), (-1, False)):
        size = f"{(plan.bytes_on('host') + spare) / 1024:.6f}KiB"
        text = rules_text(tail="kv_cache: {tokens: 64}\n").replace("{gpu: cuda:0}", f"{{host: {{memory: {size}}}}}")
        if fits:
            assert make_plan(parse_rules(text), small_config(), machine(64)).rows == plan.rows
        else:
            with pytest.raises(MemoryBudgetError):
                make_plan(parse_rules(text), small_config(), machine(64))


def test_rules_that_allow_more_than_the_machine_has_do_not_add_memory() -> None:
    text = rules_text().replace("{gpu: cuda:0}", "{host: {memory: 640GiB}}")
    with pytest.raises(MemoryBudgetError, match=r"256\.00 GiB free less"):
        make_plan(parse_rules(text), K2_6, machine(256))


@given(st.integers(0, 1 << 44))
def test_the_reserve_leaves_at_least_half(available: int) -> None:
    reserve = reserve_bytes(available)
    assert reserve == min(GIB + available // 50, available // 2)
    assert 0 <= reserve_bytes(available + 1) - reserve <= 1


# Showing a plan


def test_plans_are_frozen_and_small_in_print() -> None:
    plan = make_plan(shipped_rules("gpu"), K2_6, machine(768, 80))
    for part in (plan, plan.rows[0], plan.kv_cache, plan.rules, plan.machine):
        assert len(repr(part)) < 140
        with pytest.raises(FrozenInstanceError):
            part.device = "elsewhere"  # type: ignore[misc]
    assert repr(plan) == "Plan('rules/gpu.yaml', kimi_k25, cuda:0 24.24 GiB, host 533.75 GiB, numerics='exact')"


def test_the_table_is_aligned_and_adds_up() -> None:
    plan = make_plan(shipped_rules("gpu"), K2_6, machine(768, 80))
    lines = plan.table().splitlines()
    body = lines[lines.index("") + 1 : lines.index("", lines.index("") + 1)]
    assert [line.split()[0] for line in body] == ["group", *(row.what for row in plan.rows), "kv_cache"]
    ends = {match.end() for line in body for match in re.finditer(r"GiB|MiB|size", line)}
    assert len(ends) == 1
    assert len({len(line) for line in body}) == 1
    starts = {line.index(word) for line in body for word in re.findall(r"device|host|cuda:0", line)[:1]}
    assert len(starts) == 1
    for device in plan.devices:
        assert f"{device}: {format_bytes(plan.bytes_on(device))} of " in plan.table()
    assert plan.bytes_on("cuda:0") + plan.bytes_on("host") == sum(r.nbytes for r in plan.rows) + plan.kv_cache.nbytes


# The documentation


def doc_blocks() -> list[tuple[str, str]]:
    text = (REPO / "docs" / "rules.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.M | re.S)


def test_the_rule_files_in_the_documentation_load() -> None:
    blocks = doc_blocks()
    wrong = {text for (_, text), (_, out) in pairwise(blocks) if out.startswith("error: ")}
    files = [text for kind, text in blocks if kind == "yaml" and text not in wrong]
    assert len(files) >= 3
    for block in files:
        assert make_plan(parse_rules(block), K2_6, machine(768, 80)).rows


def test_the_errors_in_the_documentation_are_what_is_printed() -> None:
    blocks = doc_blocks()
    errors = [(text, out) for (_, text), (_, out) in pairwise(blocks) if out.startswith("error: ")]
    assert len(errors) >= 8
    for text, out in errors:
        with pytest.raises((RulesError, HardwareError)) as caught:
            make_plan(parse_rules(text, "my.yaml"), K2_6, machine(768, 80))
        assert f"error: {caught.value}\n" == out


def test_the_table_in_the_documentation_is_what_is_printed() -> None:
    tables = [block for _, block in doc_blocks() if block.startswith("kimi_k25")]
    assert tables == [make_plan(shipped_rules("gpu"), K2_6, machine(768, 80)).table() + "\n"]

"""The plan: complete and unambiguous placement, and rules that are refused with their lines."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hybrid_k2.errors import RulesError
from hybrid_k2.host.threads import NodeThreads
from hybrid_k2.host.topology import HostNode
from hybrid_k2.placement import Machine, Placement, Plan, make_plan, parse_rules, shipped_rules
from hybrid_k2.placement.plan_json import plan_values
from tests.unit.placements import (
    GIB,
    HOST,
    K2_6,
    SMALL_VISION,
    machine,
    plan_of,
    refusal,
    rules_text,
    small_config,
)


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


def test_an_unnamed_router_follows_its_attention() -> None:
    on_gpu = plan_of("attention gpu")
    assert {on_gpu.where("router", layer) for layer in range(2, 7)} == {Placement("cuda:0", "fp32")}
    named = plan_of("attention gpu", "router host layers: 2..3, dtype: bf16", "router gpu layers: 4..6")
    assert named.where("router", 3) == Placement("host", "bf16")
    assert named.where("router", 4) == Placement("cuda:0", "fp32")
    partly = plan_of("attention gpu", "router host layers: 4")
    assert partly.where("router", 4) == Placement("host", "bf16")
    assert [partly.where("router", layer).device for layer in range(2, 7)] == ["cuda:0"] * 2 + ["host"] + ["cuda:0"] * 2


def test_a_router_on_the_host_is_kept_as_the_native_kernels_read_it() -> None:
    assert plan_of().where("router", 2) == Placement("host", "bf16")
    assert plan_of("router host dtype: fp32").where("router", 2) == Placement("host", "fp32")
    reference = plan_of(tail="numerics: reference\n")
    assert reference.where("router", 2) == plan_of(packed=False).where("router", 2) == Placement("host", "fp32")


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


def test_nodes_are_left_together_where_one_lacks_the_cores() -> None:
    on = two_nodes(384)
    cores = on.core_cpus
    uneven = replace(on, nodes=(replace(on.nodes[0], cores=cores[:14]), replace(on.nodes[1], cores=cores[14:])))
    plan = make_plan(shipped_rules("host"), K2_6, uneven)
    assert plan.nodes == (NodeThreads(15, None, cores[1:]),)
    assert plan.notes[-1] == (
        "numa: node 1 has 2 of 16 cores, too few for an equal part of the routed experts, so the nodes are not told "
        "apart (slower)"
    )


def test_numa_by_rule() -> None:
    def nodes(numa: str, on: Machine) -> tuple[NodeThreads, ...]:
        text = rules_text().replace("{gpu: cuda:0}", f"{{host: {{{numa}}}}}")
        return make_plan(parse_rules(text), K2_6, on).nodes

    assert nodes("numa: off", two_nodes(384)) == (NodeThreads(15),)
    assert nodes("numa: 3, threads: 7", two_nodes(384)) == (NodeThreads(2), NodeThreads(2), NodeThreads(3))
    assert nodes("numa: 4", machine(768, cores=2)) == (NodeThreads(1),) * 4
    assert "numa: 4 virtual nodes take 4 threads, where 1 have work" in plan_of_numa(4).notes
    assert "2 threads on 2 virtual nodes" in plan_of_numa(2).table()


def plan_of_numa(nodes: int) -> Plan:
    text = rules_text().replace("{gpu: cuda:0}", f"{{host: {{numa: {nodes}}}}}")
    return make_plan(parse_rules(text), small_config(), machine(64))


def test_threads_numerics_and_chunks() -> None:
    text = rules_text().replace("{gpu: cuda:0}", "{host: {threads: 3}}")
    plan = make_plan(parse_rules(text), small_config(), machine(64, cores=5))
    assert (plan.threads, plan.numerics, plan.chunk_tokens) == (3, "exact", 512)
    assert not any("take turns" in note for note in plan.notes)
    crowded = make_plan(parse_rules(text), small_config(), machine(64, cores=2))
    assert crowded.threads == 3
    assert "threads: 3 take turns on the 2 cores at hand" in crowded.notes
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


def test_vision_goes_to_the_host_unless_a_rule_names_it() -> None:
    config = small_config(model_type="kimi_k25", vision=SMALL_VISION)
    unnamed, on_gpu = plan_of(config=config), plan_of("vision gpu dtype: fp32", config=config)
    assert (unnamed.where("vision"), on_gpu.where("vision")) == (
        Placement("host", "bf16"),
        Placement("cuda:0", "fp32"),
    )
    for plan in (unnamed, on_gpu):
        assert plan.notes == ()
        assert (plan.accelerator, plan.activation_dtype) == (None, "fp32"), "the text is computed as without images"
    (row,) = (row for row in unnamed.rows if row.what == "vision")
    assert (row.layers, row.line) == (None, 0)
    assert "vision" in [text for _, text in unnamed.items_on("host")]
    assert "vision (line 4)" in [text for _, text in on_gpu.items_on("cuda:0")]
    lines = [line["line"] for line in plan_values(unnamed)["groups"] if line["what"] == "vision"]
    assert lines == [None]
    assert re.search(r"\nvision +- +cuda:0 +fp32 ", on_gpu.table())
    assert re.search(r"\nencoding +- +cuda:0 +- ", on_gpu.table())
    without = plan_of()
    assert unnamed.bytes_per_token == without.bytes_per_token, "an image is encoded before tokens are decoded"
    assert unnamed.bytes_on("host") - without.bytes_on("host") == row.nbytes + sum(
        one.nbytes for one in unnamed.overheads
    )


def test_two_rules_for_vision() -> None:
    config = small_config(model_type="kimi_k25", vision=SMALL_VISION)
    assert "vision is already placed by rule 1 on line 4" in refusal("vision host", "vision gpu", config=config).message

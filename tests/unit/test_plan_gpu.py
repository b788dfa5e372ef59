"""What a card holds: narrow dense groups, hot experts and work memory, and the rule files for cards of common sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.errors import HardwareError, MemoryBudgetError
from hybrid_k2.placement import Machine, Plan, make_plan, parse_rules, shipped_rules
from hybrid_k2.placement.budget import CONTEXT_BYTES, LIBRARY_BYTES, find_budget, gpu_reserve_bytes
from hybrid_k2.placement.groups import group_bytes
from hybrid_k2.placement.overheads import STAGED_EXPERTS, Work, gpu_overheads, graphs_bytes, workspace_bytes
from tests.unit.placements import GIB, K2_6, machine, plan_of, refusal, rules_text, small_config

EXPERT = 3 * 2048 * 7168 * 18 // 32  # bytes of one expert of K2.6


def left_on(plan: Plan, device: str = "cuda:0") -> int:
    return find_budget(device, plan.rules, plan.machine).nbytes - plan.bytes_on(device)


def test_fp8_counts_a_byte_for_each_weight_and_a_scale_for_each_row() -> None:
    hidden = 7168
    assert group_bytes(K2_6, "shared_experts", "fp8") == 3 * 2048 * hidden + 4 * (2048 + 2048 + hidden)
    assert group_bytes(K2_6, "lm_head", "fp8") == 163840 * hidden + 4 * 163840 + 2 * hidden
    bf16, fp8 = (group_bytes(K2_6, "attention", dtype) for dtype in ("bf16", "fp8"))
    rows = 1536 + 64 * 192 + 576 + hidden
    quantised = 1536 * hidden + 64 * 192 * 1536 + 576 * hidden + hidden * 64 * 128
    assert fp8 == bf16 - quantised + 4 * rows
    for what in ("attention", "dense_mlp", "shared_experts", "lm_head"):
        assert group_bytes(K2_6, what, "fp8") < group_bytes(K2_6, what, "int8")


def test_fp8_needs_a_card_that_has_it() -> None:
    def on(capability: tuple[int, int] | None) -> Machine:
        one = machine(64, 24)
        return replace(one, gpus=(replace(one.gpus[0], capability=capability),))

    assert plan_of("lm_head gpu dtype: fp8", on=on((8, 9))).notes == ()
    (note,) = plan_of("lm_head gpu dtype: fp8", on=on(None)).notes
    assert note == "cuda:0: fp8 needs a card of compute capability 8.9 or more (Ada, Hopper, Blackwell)"
    with pytest.raises(HardwareError) as caught:
        plan_of("lm_head gpu dtype: fp8", on=on((8, 6)))
    assert caught.value.message == (
        "x.yaml:4: dtype fp8: expected a GPU of compute capability 8.9 or more, got cuda:0 (Test GPU) with 8.6"
    )
    assert plan_of("lm_head gpu dtype: int8", on=on((8, 0))).notes == ()


def hot_plan(*rules: str, gpu_gib: float = 48, tail: str = "kv_cache: {tokens: 4096}\n") -> Plan:
    lines = ["routed_experts host", *(f"routed_experts gpu {rule}" for rule in rules)]
    dense = ["attention gpu dtype: int8", "dense_mlp gpu dtype: int8", "shared_experts gpu dtype: int8", "lm_head gpu"]
    return plan_of(*dense, *lines, tail=tail, config=K2_6, on=machine(768, gpu_gib))


def test_a_hot_expert_is_held_once_unless_the_rule_says_otherwise() -> None:
    without = hot_plan()
    moved = hot_plan("hottest: 4")
    assert moved.expert_bytes == without.expert_bytes - 60 * 4 * EXPERT
    assert moved.bytes_on("host") == without.bytes_on("host") - 60 * 4 * EXPERT
    row = next(row for row in moved.rows if row.hottest)
    assert (row.device, row.dtype, row.nbytes, row.layer_text) == ("cuda:0", "int4", 60 * 4 * EXPERT, "1..60")
    twice = hot_plan("hottest: 4, also_on_host: true")
    assert twice.expert_bytes == without.expert_bytes
    assert twice.bytes_on("cuda:0") == moved.bytes_on("cuda:0")
    assert [len(plan.hot_experts(17)) for plan in (without, moved, twice)] == [0, 4, 4]
    assert moved.where("routed_experts", 17).device == "host"
    assert moved.bytes_per_token == without.bytes_per_token


def test_the_experts_that_are_known_to_be_used_most_are_taken() -> None:
    rules = rules_text("attention gpu", "routed_experts host", "routed_experts gpu layers: 3..5, hottest: 2")
    config = small_config()
    usage = {layer: [layer * expert % 5 for expert in range(24)] for layer in config.moe_layers if layer != 5}
    plan = make_plan(parse_rules(rules, "x.yaml"), config, machine(64, 24), usage=usage)
    assert [plan.hot_experts(layer) for layer in (2, 3, 4, 5)] == [(), (3, 8), (1, 6), (0, 1)]
    assert plan.notes == ()
    assert plan.usage == usage
    without = make_plan(parse_rules(rules, "x.yaml"), config, machine(64, 24))
    assert [without.hot_experts(layer) for layer in (2, 3, 4, 5)] == [(), (0, 1), (0, 1), (0, 1)]
    assert without.notes == (
        "hottest: which experts are used most is not known here yet: taken by number, and changed as it turns out",
    )
    assert without.bytes_on("cuda:0") == plan.bytes_on("cuda:0")


def test_an_expert_that_becomes_hot_needs_a_place_beside_the_others() -> None:
    plans = [hot_plan(), hot_plan("hottest: 4"), hot_plan("hottest: 4", tail="prefill: {stream: auto}\n")]
    staging = [{one.what: one.nbytes for one in plan.overheads}.get("staging", 0) for plan in plans]
    assert staging == [0, EXPERT, (STAGED_EXPERTS + 1) * EXPERT]


def test_layers_may_have_different_numbers_of_hot_experts() -> None:
    plan = hot_plan("layers: 1..10, hottest: 8", "layers: [20, 30..31], hottest: 2")
    assert [len(plan.hot_experts(layer)) for layer in (0, 1, 10, 11, 20, 30, 31, 60)] == [0, 8, 8, 0, 2, 2, 2, 0]
    assert plan.expert_bytes == (60 * 384 - 86) * EXPERT
    assert "\n8 hottest experts  1..10 " in plan.table()


@given(st.floats(30, 100))
def test_auto_fills_what_the_card_has_left(gpu_gib: float) -> None:
    plan = hot_plan("hottest: auto", gpu_gib=gpu_gib)
    assert 0 <= left_on(plan) < 60 * EXPERT
    mixed = hot_plan("layers: 1..20, hottest: 5", "layers: 21..60, hottest: auto", gpu_gib=gpu_gib)
    assert len(mixed.hot_experts(3)) == 5
    assert 0 <= left_on(mixed) < 40 * EXPERT


def test_auto_takes_none_where_nothing_is_left_and_no_more_than_there_are() -> None:
    plan = hot_plan("hottest: auto", gpu_gib=15)
    assert plan.hot_experts(1) == ()
    assert not any(row.hottest for row in plan.rows)
    assert any("no room left" in note for note in plan.notes)
    small = plan_of("attention gpu", "routed_experts host", "routed_experts gpu hottest: auto")
    assert len(small.hot_experts(2)) == small.config.n_routed_experts
    assert small.expert_bytes == 0


def test_hot_experts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        MemoryBudgetError, match=r"cuda:0: .*the biggest: 40 hottest experts of layers 1..60 \(line 9\) 55.37"
    ):
        hot_plan("hottest: 40")


def test_hot_rules_are_checked_against_the_model_and_each_other() -> None:
    error = refusal("routed_experts host", "routed_experts gpu hottest: 25")
    assert (
        error.message
        == "x.yaml:5: place rule 2 (routed_experts): hottest: expected at most 24 (the model's experts), got 25"
    )
    error = refusal(
        "routed_experts host", "routed_experts gpu layers: 2..4, hottest: 1", "routed_experts gpu layers: 4, hottest: 1"
    )
    assert "routed_experts of layer 4 is already placed by rule 2 on line 5" in error.message
    error = refusal("routed_experts gpu hottest: 3")
    assert error.message == "x.yaml: place: expected a rule for every group, got none for routed_experts of layers 2..6"
    error = refusal("routed_experts host", "routed_experts gpu hottest: 3", tail="numerics: reference\n")
    assert error.message.endswith("hottest: expected numerics exact, fast or bf16, got reference")
    error = refusal("routed_experts host", "routed_experts gpu hottest: 3", packed=False)
    assert error.message.endswith("hottest: expected a checkpoint with INT4 experts, got an unpacked one")


def test_work_memory_grows_with_what_is_computed_at_once() -> None:
    work = Work(K2_6, "cuda:0", "bf16", chunk_tokens=512)
    base = workspace_bytes(work)
    for change in (
        {"chunk_tokens": 4096}, {"context_tokens": 65536}, {"activation_dtype": "fp32"}, {"sequences": 64},
    ):  # fmt: skip
        assert workspace_bytes(replace(work, **change)) > base  # type: ignore[arg-type]
    one_head = 65536 * (192 + 256) * 4  # keys and values, where 64 MiB do not hold them
    added = workspace_bytes(replace(work, context_tokens=65536)) - base
    assert added == 65536 * 576 * 4 + one_head - (64 << 20), "latents and one head's keys and values in fp32"
    forms = {"plain": {}, "staging": {"stream": True}, "graphs": {"graphs": True}}
    names = {
        name: {one.what for one in gpu_overheads(replace(work, **change), 9, GIB)}  # type: ignore[arg-type]
        for name, change in forms.items()
    }
    assert names.pop("plain") == {"workspace", "allocator", "hand-off"}
    assert all(parts == {"workspace", name, "allocator", "hand-off"} for name, parts in names.items())
    staging = next(one for one in gpu_overheads(replace(work, stream=True), 9, GIB) if one.what == "staging")
    assert staging.nbytes == STAGED_EXPERTS * EXPERT


def test_graphs_keep_the_work_memory_of_a_decode_step() -> None:
    whole, half = (graphs_bytes(Work(K2_6, "cuda:0", "bf16", 512, halves=halves)) for halves in (1, 2))
    partial_sums = 8 * 128 * 64 * 512 * 4  # of 8 rows: 128 splits, 64 heads, 512 numbers
    assert whole - 4 * 61 * (256 << 10) - partial_sums < 24 << 20
    assert whole - half > partial_sums / 2
    dense = ("attention gpu", "router gpu", "dense_mlp gpu", "shared_experts gpu", "lm_head gpu")
    plan = plan_of(*dense)
    sizes = {one.what: one.nbytes for one in plan.overheads}
    assert plan.graphs
    assert sizes["graphs"] > 0
    assert "\ncuda:0: overlap ping_pong; decode steps as graphs\n" in plan.table()
    without = plan_of(*dense, tail="graphs: off\n")
    assert not without.graphs
    assert "graphs" not in {one.what for one in without.overheads}
    assert "\ncuda:0: overlap ping_pong\n" in without.table()
    assert not plan_of().graphs
    assert not plan_of("attention gpu").graphs, "torch computes the others on the host in between"
    assert not plan_of(*dense, tail="kv_cache: {dtype: fp32}\n").graphs, "the kernels read bf16"
    error = refusal("attention gpu", tail="graphs: on\n")
    assert error.message == "x.yaml:10: graphs: expected one of auto, off, got 'on'"


def test_work_memory_holds_the_largest_tensors_of_a_step() -> None:
    """Queries twice in fp32 and the residual stream are alive together in any form of attention."""
    for rows in (64, 512, 4096):
        work = Work(K2_6, "cuda:0", "bf16", chunk_tokens=rows)
        assert workspace_bytes(work) > rows * (64 * 192 * 4 * 2 + 7168 * 2 * 2)
        hot = workspace_bytes(replace(work, hot=True))
        assert hot >= min(rows, 1024) * 8 * (7168 + 2 * 2048) * 4


def test_a_streamed_prefill_takes_longer_chunks_and_needs_a_gpu() -> None:
    plan = plan_of("attention gpu", tail="prefill: {stream: auto}\n")
    assert (plan.stream, plan.chunk_tokens) == ("auto", 2048)
    assert "prefill: chunks of 2048 tokens; heavy experts streamed\n" in plan.table()
    assert plan_of(tail="prefill: {stream: auto}\n").stream == "off"
    assert plan_of("attention gpu").stream == "off"
    for more, got in ((", numerics: reference", "numerics: reference"), ("", "a checkpoint with unpacked experts")):
        tail = "prefill: {stream: auto}\n" + more.removeprefix(", ")
        error = refusal("attention gpu", tail=tail, packed=bool(more))
        assert error.message == f"x.yaml:10: prefill: stream: expected INT4 experts, native kernels, got {got}"


@given(st.integers(0, 1 << 40))
def test_the_reserve_of_a_card(available: int) -> None:
    assert gpu_reserve_bytes(available, context=True) == min(
        CONTEXT_BYTES + LIBRARY_BYTES + available // 100, available // 2
    )
    assert gpu_reserve_bytes(available, context=False) == min(LIBRARY_BYTES + available // 100, available // 2)


def test_a_context_that_is_there_is_not_counted_again() -> None:
    described, probed = machine(64, 24), machine(64, 24)
    probed = replace(probed, gpus=(replace(probed.gpus[0], available_bytes=24 * GIB - CONTEXT_BYTES),))
    budgets = [find_budget("cuda:0", shipped_rules("gpu"), one).nbytes for one in (described, probed)]
    assert budgets[1] - budgets[0] == CONTEXT_BYTES // 100


@pytest.mark.parametrize(
    ("size", "dtype", "tokens", "hot"),
    [
        (16, "int8", 32768, 0), (24, "int8", 65536, 3), (32, "int8", 65536, 8), (48, "int8", 131072, 16),
        (80, "bf16", 131072, 32),
    ],
)  # fmt: skip
def test_k2_6_fits_each_card(size: int, dtype: str, tokens: int, hot: int) -> None:
    """On an empty card of the full size, and on one of which half a GiB is taken or not there."""
    plan = make_plan(shipped_rules(f"gpu{size}"), K2_6, machine(576, size))
    assert {
        plan.where(what, layer).dtype for what, layer in (("attention", 5), ("shared_experts", 5), ("lm_head", None))
    } == {dtype}
    assert (plan.kv_cache.tokens, plan.kv_cache.device) == (tokens, "cuda:0")
    assert len(plan.hot_experts(1)) == len(plan.hot_experts(60)) == hot
    assert 0 <= left_on(plan) < 60 * EXPERT
    less = make_plan(shipped_rules(f"gpu{size}"), K2_6, machine(576, size - 0.5))
    assert left_on(less) >= 0
    assert hot - 1 <= len(less.hot_experts(1)) <= hot
    assert less.kv_cache.tokens == tokens


def test_a_card_of_the_next_size_down_is_too_small() -> None:
    for size, smaller in ((16, 14), (24, 16)):
        with pytest.raises(MemoryBudgetError, match="cuda:0"):
            make_plan(shipped_rules(f"gpu{size}"), K2_6, machine(576, smaller))


@pytest.mark.parametrize("size", [16, 24, 32, 48, 80])
@pytest.mark.parametrize("shape", [{}, {"n_shared_experts": 0, "first_k_dense_replace": 0}])
def test_the_files_for_cards_place_other_checkpoints(size: int, shape: dict[str, int]) -> None:
    config = small_config(max_position_embeddings=262144, **shape)
    plan = make_plan(shipped_rules(f"gpu{size}"), config, machine(64, size))
    assert plan.accelerator == "cuda:0"
    assert len(plan.hot_experts(3)) == (0 if size == 16 else 24)

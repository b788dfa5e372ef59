"""The host twin in the plan: its memory is the host's, its threads are taken from the experts'."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybrid_k2.errors import MemoryBudgetError, RulesError
from hybrid_k2.placement import Plan, make_plan, parse_rules, shipped_rules
from hybrid_k2.placement.overheads import STAGED_EXPERTS
from tests.unit.placements import GIB, K2_6, machine, plan_of, rules_text, small_config


def twin_plan(*lines: str, devices: str = "gpu: twin", tail: str = "", cores: int = 16, kimi: bool = True) -> Plan:
    text = rules_text(*lines, tail=tail).replace("gpu: cuda:0", devices)
    return make_plan(parse_rules(text, "x.yaml"), K2_6 if kimi else small_config(), machine(768, cores=cores))


def test_the_memory_of_the_twin_is_the_hosts() -> None:
    twin, host = (make_plan(shipped_rules(name), K2_6, machine(768)) for name in ("twin", "host"))
    assert twin.devices == host.devices == ("host",)
    assert twin.bytes_on("host") == host.bytes_on("host")
    assert [row.nbytes for row in twin.rows] == [row.nbytes for row in host.rows]
    assert (twin.where("attention", 3).device, twin.where("attention", 3).memory) == ("twin", "host")
    assert twin.where("routed_experts", 3).device == twin.where("embedding").device == "host"
    assert twin.kv_cache.device == "twin"
    assert twin.kv_cache.nbytes == host.kv_cache.nbytes
    assert (twin.activation_dtype, host.activation_dtype) == ("fp32", "fp32"), "no GPU meets the residual stream"
    assert repr(twin).startswith("Plan('rules/twin.yaml', kimi_k25, host 559.55 GiB")


def test_a_plan_with_the_twin_must_fit_the_host() -> None:
    with pytest.raises(
        MemoryBudgetError, match=r"rules/twin.yaml: host: expected a plan of at most .* attention of layers"
    ):
        make_plan(shipped_rules("twin"), K2_6, machine(555))


def test_threads_follow_the_multiplications_of_both_sides() -> None:
    """Of K2.6, a third of what a token is multiplied with is dense."""
    plan = make_plan(shipped_rules("twin"), K2_6, machine(768, cores=2))
    assert (plan.twin_threads, plan.threads) == (1, 1)
    for cores, total in ((4, 4), (8, 8), (15, 15), (16, 15), (64, 63)):
        plan = make_plan(shipped_rules("twin"), K2_6, machine(768, cores=cores))
        assert plan.twin_threads + plan.threads == total
        assert plan.twin_threads == pytest.approx(total / 3, abs=0.6)
    less = twin_plan("lm_head gpu", cores=32)
    assert less.twin_threads == 2, "5 % of the multiplications, of 31 threads"


def test_both_sides_have_a_thread_on_any_machine() -> None:
    for cores in (1, 2):
        plan = twin_plan("attention gpu", "dense_mlp gpu", "shared_experts gpu", cores=cores, kimi=False)
        assert (plan.twin_threads, plan.threads) == (1, 1)


def test_hot_experts_of_the_twin_are_in_the_hosts_memory_and_its_share() -> None:
    dense = ("attention gpu", "dense_mlp gpu", "shared_experts gpu")
    without = twin_plan(*dense, cores=64)
    once, twice = (
        twin_plan(*dense, "routed_experts host", f"routed_experts gpu hottest: 96{more}", cores=64)
        for more in ("", ", also_on_host: true")
    )
    expert = without.expert_bytes // 60 // 384
    assert once.bytes_on("host") == without.bytes_on("host")
    assert twice.bytes_on("host") == without.bytes_on("host") + 60 * 96 * expert
    assert (once.where("routed_experts", 7).device, once.hot_row(7).device) == ("host", "twin")  # type: ignore[union-attr]
    assert once.accelerator == "twin"
    assert without.twin_threads < once.twin_threads == twice.twin_threads <= 31
    only = twin_plan("routed_experts host", "routed_experts gpu hottest: 2", kimi=False)
    assert (only.accelerator, only.overlap) == ("twin", "off")


def test_threads_by_rule() -> None:
    plan = twin_plan("attention gpu", devices="gpu: twin, twin_threads: 5, host: {threads: 9}")
    assert (plan.twin_threads, plan.threads) == (5, 4)
    plan = twin_plan("attention gpu", devices="gpu: twin, twin_threads: 40, host: {threads: 41}")
    assert (plan.twin_threads, plan.threads) == (40, 1), "more than cores, as asked"
    assert twin_plan(devices="gpu: twin, twin_threads: 5").twin_threads == 0, "nothing is on it"


@pytest.mark.parametrize("cores", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("kimi", [False, True])
def test_the_twins_threads_are_among_the_cores_where_the_sum_is_open(cores: int, kimi: bool) -> None:
    most = max(1, cores - 1)
    for asked in {1, (most + 1) // 2, most}:
        plan = twin_plan("attention gpu", devices=f"gpu: twin, twin_threads: {asked}", cores=cores, kimi=kimi)
        assert plan.twin_threads == asked
        assert 1 <= plan.threads <= max(1, cores - asked)
    with pytest.raises(RulesError) as caught:
        twin_plan("attention gpu", devices=f"gpu: twin, twin_threads: {most + 1}", cores=cores, kimi=kimi)
    assert caught.value.message == (
        f"x.yaml:2: devices: twin_threads: expected at most {most} (of the {cores} cores at hand, one is for the "
        f"experts), got {most + 1}"
    )
    assert "host: {threads: N}" in (caught.value.hint or "")


def test_cores_of_their_own_are_those_of_the_experts() -> None:
    on = replace(machine(768, cores=8), core_cpus=tuple((core,) for core in range(8)))
    plan = make_plan(shipped_rules("twin"), K2_6, on)
    assert (plan.twin_threads, plan.nodes[0].cpus) == (3, ((3,), (4,), (5,), (6,), (7,)))


def test_overlap_is_chosen_where_attention_is_not_on_the_host() -> None:
    assert (twin_plan("attention gpu").overlap, twin_plan("attention gpu").accelerator) == ("ping_pong", "twin")
    assert twin_plan("attention gpu", tail="overlap: off\n").overlap == "off"
    assert (twin_plan("lm_head gpu").overlap, twin_plan("lm_head gpu").accelerator) == ("off", "twin")
    assert (twin_plan().overlap, twin_plan().accelerator) == ("off", None)
    on_gpu = plan_of("attention gpu")
    assert (on_gpu.overlap, on_gpu.accelerator, on_gpu.twin_threads) == ("ping_pong", "cuda:0", 0)
    assert plan_of("attention gpu", tail="overlap: ping_pong\n").overlap == "ping_pong"


def test_overlap_needs_attention_beside_the_experts() -> None:
    with pytest.raises(RulesError) as caught:
        twin_plan("lm_head gpu", tail="numerics: exact\noverlap: ping_pong\n")
    assert caught.value.message == (
        "x.yaml:11: overlap: expected off (the threads of the experts compute attention too), got ping_pong"
    )
    assert "twin" in (caught.value.hint or "")


def test_the_table_names_the_twin() -> None:
    table = make_plan(shipped_rules("twin"), K2_6, machine(768, cores=16)).table()
    assert "\ntwin: 5 threads; overlap ping_pong\n" in table
    assert "experts: exact, 10 threads; activations fp32\n" in table
    assert [line.split()[2] for line in table.splitlines() if line.startswith(("attention", "routed"))] == [
        "twin",
        "host",
    ]
    assert "\nhost: 559.55 GiB of " in table


def test_a_streamed_prefill_takes_places_for_experts_in_the_hosts_memory() -> None:
    without, plan = (twin_plan("attention gpu", tail=tail) for tail in ("", "prefill: {stream: auto}\n"))
    assert (without.stream, plan.stream, plan.chunk_tokens) == ("off", "auto", 2048)
    staging = next(one for one in plan.overheads if one.what not in ("encoding", "features"))
    assert (staging.what, staging.device) == ("staging", "twin")
    beside = [one.bytes_on("host") - sum(part.nbytes for part in one.overheads) for one in (without, plan)]
    assert beside[0] == beside[1], "no other part of the plan depends on it"
    assert staging.nbytes == STAGED_EXPERTS * without.expert_bytes // 60 // 384
    assert plan.devices == ("host",)
    assert "\nstaging  " in plan.table()
    assert twin_plan(tail="prefill: {stream: auto}\n").stream == "off", "nothing is on the twin"


def test_a_context_of_the_twin_is_short() -> None:
    assert twin_plan("attention gpu", tail="overlap: off\n").kv_cache.nbytes < 5 * GIB

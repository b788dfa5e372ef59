"""What the plan fits into: the KV cache, devices and budgets, refused before anything is loaded."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.errors import HardwareError, MemoryBudgetError, RulesError
from hybrid_k2.placement import make_plan, parse_rules, shipped_rules
from hybrid_k2.placement.budget import reserve_bytes
from tests.conftest import REPO
from tests.unit.placements import GIB, HOST, K2_6, machine, plan_of, refusal, rules_text, small_config


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


@pytest.mark.parametrize("gpu", ["cuda:0", "twin"])
@pytest.mark.parametrize("tail", ["", "kv_cache: {on: host}\n", "kv_cache: {on: gpu}\n"])
def test_attention_on_two_devices_is_refused_as_such(gpu: str, tail: str) -> None:
    text = rules_text("attention host layers: 0..3", "attention gpu layers: 4..6", tail=tail)
    with pytest.raises(RulesError) as caught:
        make_plan(parse_rules(text.replace("cuda:0", gpu), "x.yaml"), small_config(), machine(64, 24))
    assert caught.value.message == (
        "x.yaml:5: attention: expected all layers on one device, with the KV cache, "
        f"got host on line 4 and {gpu} on line 5"
    )


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
    assert "got 555.26 GiB; the biggest: routed_experts of layers 1..60 (line 9) 531.56 GiB, attention" in message
    assert "--dry-run --host-memory SIZE" in (caught.value.hint or "")


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


def test_the_size_of_a_card_bounds_it_and_its_reserve_is_within() -> None:
    def budget(size: str, *gpu_gib: float) -> str:
        text = rules_text("attention gpu").replace("cuda:0", f"cuda:0, gpu_memory: {size}")
        plan = make_plan(parse_rules(text, "x.yaml"), small_config(), machine(64, *gpu_gib))
        return next(line for line in plan.table().splitlines() if line.startswith("cuda:0: ") and " of " in line)

    assert budget("24GiB", 80).endswith(
        "of 23.14 GiB (devices.gpu_memory of 24.00 GiB on line 2 less 885.76 MiB in reserve)"
    )
    assert budget("24GiB", 23).endswith("of 22.15 GiB (23.00 GiB free less 875.52 MiB in reserve)")
    assert budget("auto", 80).endswith("of 78.58 GiB (80.00 GiB free less 1.42 GiB in reserve)")


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

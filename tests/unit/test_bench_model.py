"""`bench model`: what a step reads and computes by the plan, what is measured, and what a report says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from random import Random

import pytest
import torch
from typer.main import get_command

from hybrid_k2.bench.model import ModelReport, ModelResult, choose_cases, measure_model
from hybrid_k2.bench.step_work import Limits, StepWork, step_work
from hybrid_k2.cli.bench import app
from hybrid_k2.engine import Engine
from hybrid_k2.errors import ConfigError
from hybrid_k2.experts.usage import ExpertUse
from hybrid_k2.model.batch import Batch
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import Gpu, Machine, Plan, make_plan, shipped_rules
from hybrid_k2.placement.groups import latent_bytes_per_token
from tests.conftest import REPO
from tests.engines import free_pages, native_engine, random_engine
from tests.unit.placements import GIB, K2_6

CARD = Gpu(0, "card", 80 * GIB, 79 * GIB, (9, 0))
EXPERT = 3 * 7168 * 2048  # weights

pytestmark = pytest.mark.usefixtures("small_probes")


def plan_of(rules: str) -> Plan:
    return make_plan(shipped_rules(rules), K2_6, Machine(900 * GIB, 890 * GIB, 64, (CARD,)))


def uses(chosen: list[int], hot: dict[int, list[int]] | None = None) -> dict[int, ExpertUse]:
    """Return counts that go on from 7 with these choices in every layer."""
    counts = [7 + chosen.count(expert) for expert in range(384)]
    return {layer: ExpertUse(counts, (hot or {}).get(layer, [])) for layer in K2_6.moe_layers}


@pytest.mark.parametrize("rules", ["host", "gpu", "gpu80"])
def test_one_token_reads_what_the_plan_says(rules: str) -> None:
    plan = plan_of(rules)
    hot = {layer: [*plan.hot_experts(layer)] for layer in K2_6.moe_layers}
    chosen = Random(5).sample([e for e in range(384) if all(e not in each for each in hot.values())], 8)
    work = step_work(plan, tokens=1, cached=100, logits=1, before=uses([], hot), after=uses(chosen, hot))
    expected = {memory: plan.bytes_per_token_on(memory) for memory in plan.devices}
    expected[plan.kv_cache.device] += 100 * latent_bytes_per_token(K2_6, plan.kv_cache.dtype)
    assert {memory: work.read_bytes.get(memory, 0) for memory in expected} == expected
    assert work.distinct == [8] * 60


def test_hot_experts_are_read_on_the_card() -> None:
    plan = plan_of("gpu80")
    hot = {layer: [*plan.hot_experts(layer)] for layer in K2_6.moe_layers}
    assert all(hot.values())
    before, after = uses([], hot), {layer: uses([each[0]], hot)[layer] for layer, each in hot.items()}
    none = step_work(plan, tokens=0, cached=0, logits=0, before=before, after=before)
    work = step_work(plan, tokens=0, cached=0, logits=0, before=before, after=after)
    assert work.read_bytes["cuda:0"] - none.read_bytes["cuda:0"] == 60 * EXPERT * 18 // 32
    assert work.read_bytes["host"] == none.read_bytes["host"]
    assert work.operations.get("experts", 0) == 0


def test_operations_of_several_tokens() -> None:
    plan = plan_of("host")
    chosen = [1, 1, 5, 9]  # three distinct experts, four choices
    work = step_work(plan, tokens=3, cached=0, logits=2, before=uses([]), after=uses(chosen))
    assert work.operations["experts"] == 60 * 4 * 2 * EXPERT
    assert work.distinct == [3] * 60
    dense = 2 * 3 * (plan.bytes_per_token - 60 * 8 * EXPERT * 18 // 32 - 2 * 7168) // 2  # all but the experts are bf16
    head = 2 * (163840 * 7168 + 7168)
    bias = 60 * 384 * 4  # of the routers, which is in fp32 and adds
    assert work.operations["bf16"] == dense - 3 * bias - head


def test_the_floor_is_the_longer_of_both_times() -> None:
    work = StepWork({"host": 2 * 10**9, "cuda:0": 10**12}, {"experts": 10**12, "bf16": 10**11, "int8": 10**15})
    assert work.floor_s(Limits(1.0, {"experts": 1000.0, "bf16": 1000.0})) == pytest.approx(2.0)
    assert work.floor_s(Limits(10.0, {"experts": 1000.0, "bf16": 100.0})) == pytest.approx(2.0)
    assert work.floor_s(Limits(10.0, {})) == pytest.approx(0.2)
    assert work.floor_s(Limits(None, {"experts": 1000.0})) is None


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    if NATIVE_ERROR is not None:
        pytest.skip(f"no native extension: {NATIVE_ERROR}")
    with native_engine(tmp_path) as engine:
        yield engine


def test_the_figures_belong_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[list[tuple[int, int]]] = []  # tokens and cached tokens of each step
    forward = engine.loaded.text.forward

    def recorded(batch: Batch, cache: object) -> torch.Tensor:
        computed.append([(part.stop - part.start, part.cached) for part in batch.sequences])
        return forward(batch, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.loaded.text, "forward", recorded)
    pages = free_pages(engine)
    said: list[str] = []
    cases = choose_cases(engine.plan, [40, 5], [1, 3], 70, 4)
    report = measure_model(engine, "tiny", cases, rounds=2, progress=said.append)
    keys = [(result.phase, result.sequences, result.depth, result.tokens) for result in report.results]
    assert keys == [("prompt", 1, 0, 40), ("prompt", 1, 0, 5), ("decode", 1, 70, 4), ("decode", 3, 70, 4)]
    for result in report.results:
        pieces = 1 if result.phase == "prompt" else result.tokens
        assert result.tokens_per_s == pytest.approx(result.sequences * result.tokens / (result.ms * pieces / 1e3))
        assert result.floor_ms is not None
        assert result.share_of_floor is not None
        assert result.floor_ms > 0 < result.share_of_floor
        assert 2 <= result.experts <= 8
        assert result.read_bytes.keys() == {"host"}
    assert report.results[2].read_bytes["host"] >= engine.plan.bytes_per_token
    # Prompts: chunks of 16 that begin at 0, a warm one of 5 first; then two rounds of both.
    forty, five = [[(16, 0)], [(16, 16)], [(8, 32)]], [[(5, 0)]]
    assert computed[: 1 + 2 * 4] == five + 2 * (forty + five)
    # Decoding: each prompt once; a later round computes its last token again, and then the four tokens.
    prompt = [[(16, 0)], [(16, 16)], [(16, 32)], [(16, 48)], [(6, 64)]]
    one, three = [[(1, at)] for at in range(70, 74)], [[(1, at)] * 3 for at in range(70, 74)]
    again = [[(1, 69)]]
    first = prompt + one + again + prompt + prompt + three
    later = again + one + 3 * again + three
    assert computed[9:] == first + 2 * later
    assert free_pages(engine) == pages
    assert said[0] == "prompt of 40 tokens, round 1 of 2"
    assert said[-1] == "3 decoding, round 2 of 2"
    assert json.loads(json.dumps(report.to_json()))["results"][3]["sequences"] == 3
    assert set(report.peak_gops) == {"experts", "bf16"}
    assert len(report.table().splitlines()) == 3 + 4


def test_the_reference_has_no_floor(tmp_path: Path) -> None:
    with random_engine(tmp_path) as engine:
        report = measure_model(engine, "tiny", choose_cases(engine.plan, [3], [2], 5, 2), rounds=1)
    assert (report.raw_read_gbps, report.peak_gops) == (None, {})
    assert all(result.floor_ms is result.share_of_floor is None for result in report.results)
    assert all(result.tokens_per_s > 0 for result in report.results)
    assert "raw read not known; peaks: not known" in report.table()
    assert report.table().splitlines()[-1].endswith(" -")


def test_memory_that_is_too_short_for_the_probe_leaves_the_speeds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_k2.experts.read_probe.host_memory", lambda: (1 << 34, 1 << 20))
    report = measure_model(engine, "tiny", choose_cases(engine.plan, [3], [1], 5, 2), rounds=1)
    assert report.raw_read_gbps is None
    assert all(result.tokens_per_s > 0 and result.share_of_floor is None for result in report.results)


def test_what_is_left_out_is_chosen_as_far_as_it_fits(engine: Engine) -> None:
    cases = choose_cases(engine.plan)  # a cache of 640 tokens
    assert (cases.prompts, cases.sequences, cases.depth, cases.tokens) == ((512,), (1,), 512, 32)
    assert choose_cases(engine.plan, depth=20, tokens=10).sequences == (1, 4)  # a page of 64 tokens for each of ten
    wide = choose_cases(plan_of("host"))
    assert (wide.prompts, wide.sequences, wide.depth) == ((512, 4096), (1, 4, 16), 512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [5, 640]}, "--prompt: expected at most 640 tokens and the first one of the reply, .* got 641"),
        ({"depth": 630}, "--depth, --tokens: expected at most 640 tokens of a sequence, .* got 663"),
        ({"tokens": 639}, "--depth, --tokens: expected at most 640 tokens of a sequence, .* got 641"),
        ({"sequences": [2, 11], "depth": 20}, "--sequences: expected at most 10 sequences of 53 tokens, .* got 11"),
    ],
)
def test_more_than_the_cache_holds_is_refused(engine: Engine, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^bench model: {message}"):
        choose_cases(engine.plan, **arguments)  # type: ignore[arg-type]


def test_the_page_knows_every_option_and_field() -> None:
    page = (REPO / "docs" / "performance.md").read_text(encoding="utf-8")
    doc = page.split("\n## A whole model\n")[1].split("\n## ")[0]
    command = get_command(app).commands["model"]  # type: ignore[attr-defined]
    options = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    assert all(f"`{option}`" in doc for option in options - {"--help"})
    names = {field.name for kind in (ModelReport, ModelResult) for field in fields(kind)} - {"results"}
    assert not {name for name in names if f"`{name}`" not in doc}

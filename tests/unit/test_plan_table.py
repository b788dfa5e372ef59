"""A plan in print: its table, its short forms, and the rule files and errors of the documentation."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest

from hybrid_k2.errors import HardwareError, RulesError
from hybrid_k2.placement import make_plan, parse_rules, shipped_rules
from hybrid_k2.placement.budget import find_budget
from hybrid_k2.placement.sizes import format_bytes
from tests.conftest import REPO
from tests.unit.placements import GIB, K2_6, machine

SHOWN = (("gpu", 80), ("gpu24", 24))  # the tables of the documentation
CARDS = (16, 24, 32, 48, 80)


def test_plans_are_frozen_and_small_in_print() -> None:
    plan = make_plan(shipped_rules("gpu"), K2_6, machine(768, 80))
    for part in (plan, plan.rows[0], plan.kv_cache, plan.rules, plan.machine):
        assert len(repr(part)) < 140
        with pytest.raises(FrozenInstanceError):
            part.device = "elsewhere"  # type: ignore[misc]
    assert repr(plan) == "Plan('rules/gpu.yaml', kimi_k25, cuda:0 26.81 GiB, host 534.04 GiB, numerics='exact')"


def test_the_table_is_aligned_and_adds_up() -> None:
    plan = make_plan(shipped_rules("gpu"), K2_6, machine(768, 80))
    lines = plan.table().splitlines()
    body = lines[lines.index("") + 1 : lines.index("", lines.index("") + 1)]
    assert [line.split()[0] for line in body] == [
        "group", *(row.what for row in plan.rows), "kv_cache", "workspace", "graphs", "allocator", "hand-off",
        "encoding", "features",
    ]  # fmt: skip
    ends = {match.end() for line in body for match in re.finditer(r"GiB|MiB|size", line)}
    assert len(ends) == 1
    assert len({len(line) for line in body}) == 1
    starts = {line.index(word) for line in body for word in re.findall(r"device|host|cuda:0", line)[:1]}
    assert len(starts) == 1
    for device in plan.devices:
        assert f"{device}: {format_bytes(plan.bytes_on(device))} of " in plan.table()
    total = sum(part.nbytes for part in (*plan.rows, *plan.overheads)) + plan.kv_cache.nbytes
    assert plan.bytes_on("cuda:0") + plan.bytes_on("host") == total


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


def test_the_tables_in_the_documentation_are_what_is_printed() -> None:
    tables = [block for _, block in doc_blocks() if block.startswith("kimi_k25")]
    printed = [make_plan(shipped_rules(name), K2_6, machine(768, size)).table() for name, size in SHOWN]
    assert tables == [table + "\n" for table in printed]


@pytest.mark.parametrize("size", CARDS)
def test_the_sizes_of_the_cards_in_the_documentation_are_those_of_the_plans(size: int) -> None:
    plan = make_plan(shipped_rules(f"gpu{size}"), K2_6, machine(768, size))
    used, budget = (plan.bytes_on("cuda:0"), find_budget("cuda:0", plan.rules, plan.machine).nbytes)
    cells = (
        f"`gpu{size}.yaml`",
        plan.where("attention", 0).dtype,
        str(plan.kv_cache.tokens),
        str(plan.chunk_tokens),
        f"{len(plan.hot_experts(1))} of 384",
        f"{used / GIB:.2f} GiB",
        f"{(budget - used) / GIB:.2f} GiB",
        f"{plan.bytes_on('host') / GIB:.2f} GiB",
    )
    assert f"| {' | '.join(cells)} |\n" in (REPO / "docs" / "rules.md").read_text(encoding="utf-8")

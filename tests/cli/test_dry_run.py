"""`chat --dry-run`: the plan on stdout, without weights and without the GPU that it is for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hybrid_k2.placement import Machine, Rules, default_rules
from tests.cli.conftest import Done

Call = Callable[..., Done]

CARD = """\
version: 1
devices: {gpu: cuda:0, gpu_memory: 24GiB}
place:
  - {what: embedding, on: host}
  - {what: attention, on: gpu}
  - {what: dense_mlp, on: gpu}
  - {what: shared_experts, on: gpu}
  - {what: routed_experts, on: host}
  - {what: lm_head, on: gpu}
"""


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_k2.placement.machine._probe_gpus", lambda root: ((), "no NVIDIA driver"))


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "card.yaml"
    path.write_text(CARD)
    return path


def test_the_plan_alone_is_printed(call: Call, babbler: Path) -> None:
    done = call("chat", babbler, "--rules", "host", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("rules: rules/host.yaml (as asked)\n")
    assert re.search(r"^routed_experts +\S+ +host +int4 ", done.out, re.M)
    assert re.search(r"^host: .* of .* in reserve\)$", done.out, re.M)


def test_the_json_says_the_same(call: Call, babbler: Path) -> None:
    done = call("chat", babbler, "--rules", "host", "--dry-run", "--json")
    assert (done.code, done.err) == (0, "")
    plan = json.loads(done.out)
    host = plan["devices"]["host"]
    parts = [*plan["groups"], plan["kv_cache"], *plan["overheads"]]
    assert host["bytes"] == sum(part["bytes"] for part in parts) <= host["budget"]
    groups = {group["what"] for group in plan["groups"]}
    assert groups >= {"embedding", "attention", "routed_experts", "lm_head", "vision"}
    assert [one["what"] for one in plan["overheads"]] == ["encoding", "features"]
    assert (plan["accelerator"], plan["overlap"]) == (None, "off")


def test_no_weights_need_be_here(call: Call, babbler: Path, tmp_path: Path) -> None:
    """With an index it decides how the experts are stored; without one the configuration announces it."""

    def rows(folder: Path) -> list[str]:
        done = call("chat", folder, "--rules", "host", "--dry-run", "--host-memory", "8GiB")
        return [line for line in done.out.splitlines() if not line.startswith("note: host: ")]

    whole = rows(babbler)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(babbler / "config.json", bare)
    assert rows(bare) == whole
    assert any(row.startswith("routed_experts") for row in whole)
    expert = "language_model.model.layers.{}.mlp.experts.0.gate_proj.{}"
    layer = json.loads((bare / "config.json").read_text())["text_config"]["first_k_dense_replace"]
    for part, dtype in (("weight_packed", "int4"), ("weight", "bf16")):
        index = {"weight_map": {expert.format(layer, part): "model-00001-of-00064.safetensors"}}
        (bare / "model.safetensors.index.json").write_text(json.dumps(index))
        out = call("chat", bare, "--rules", "host", "--dry-run").out
        assert re.search(rf"^routed_experts +\S+ +host +{dtype} ", out, re.M)


def test_a_gpu_that_is_not_here_is_planned_as_the_rules_size_it(call: Call, babbler: Path, card: Path) -> None:
    done = call("chat", babbler, "--rules", card, "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^attention +\S+ +cuda:0 +bf16 ", done.out, re.M)
    assert re.search(r"^cuda:0: .* \(devices.gpu_memory of 24.00 GiB on line 2 less .* in reserve\)$", done.out, re.M)
    note = "note: cuda:0: no such GPU is here (no NVIDIA driver); planned for a card of 24.00 GiB\n"
    assert note in done.out
    refused = call("chat", babbler, "--rules", card, "-p", "hi")
    assert (refused.code, refused.out) == (1, "")
    assert f"error: {card}:2: devices: gpu: expected cuda:0, found no GPU (no NVIDIA driver)\n" in refused.err


def test_a_gpu_of_no_size_cannot_be_planned(call: Call, babbler: Path) -> None:
    done = call("chat", babbler, "--rules", "gpu", "--dry-run")
    assert (done.code, done.out) == (1, "")
    assert "found no GPU" in done.err
    assert "--dry-run plans for a card that is not here with devices.gpu_memory" in done.err


def test_a_plan_that_does_not_fit_is_the_error_of_loading(call: Call, babbler: Path, card: Path) -> None:
    card.write_text(CARD.replace("24GiB", "64KiB"))
    done = call("chat", babbler, "--rules", card, "--dry-run", "--json")
    assert (done.code, done.out) == (1, "")
    assert f"error: {card}: cuda:0: expected a plan of at most 32.00 KiB (devices.gpu_memory of 64.00 KiB" in done.err
    done = call("chat", babbler, "--rules", "host", "--dry-run", "--host-memory", "64KiB")
    assert (done.code, done.out) == (1, "")
    assert "host: expected a plan of at most 32.00 KiB (64.00 KiB free less 32.00 KiB in reserve)" in done.err


def test_another_host_is_described(call: Call, kimi_data: Path) -> None:
    done = call("chat", kimi_data, "--rules", "host", "--dry-run", "--host-memory", "768GiB")
    assert (done.code, done.err) == (0, "")
    assert "\nhost: 559.62 GiB of 751.64 GiB (768.00 GiB free less 16.36 GiB in reserve)\n" in done.out
    found = re.search(r"^note: host: planned for 768.00 GiB of free memory; here are (\S+) GiB$", done.out, re.M)
    assert found is not None
    assert 0 < float(found[1]) <= psutil.virtual_memory().total / 2**30


def test_rules_are_chosen_for_the_described_host(call: Call, kimi_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Machine] = []

    def choose(machine: Machine, *args: Any, **options: Any) -> Rules:
        asked.append(machine)
        return default_rules(machine, *args, **options)

    monkeypatch.setattr("hybrid_k2.engine.loading.default_rules", choose)
    done = call("chat", kimi_data, "--dry-run", "--host-memory", "768GiB")
    assert (done.code, done.err) == (0, "")
    assert [machine.host_available_bytes for machine in asked] == [768 << 30]
    assert done.out.count("note: host: planned for 768.00 GiB of free memory") == 1


@pytest.mark.parametrize("size", ["768", "", "0GiB", "many"])
def test_a_malformed_size_is_wrong_usage(call: Call, size: str) -> None:
    done = call("chat", "--dry-run", "--host-memory", size)
    assert (done.code, done.out) == (2, "")
    said = " ".join(done.err.replace("│", " ").split())
    assert f"--host-memory: expected a size above 0 with its unit, as 768GiB, got {size!r}" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--temperature", "-1"), "temperature"),
        (("--max-tokens", "0"), "max_tokens"),
        (("-p", " "), "--prompt: expected text, got none"),
        (("--system", ""), "--system: expected text, got none"),
        (("--tools", "/nowhere.json"), "/nowhere.json"),
        (("--trace", "/nowhere/trace.json"), "expected a trace file that can be written, got No such file"),
    ],
)
def test_the_other_options_are_checked(call: Call, babbler: Path, arguments: tuple[str, str], expected: str) -> None:
    done = call("chat", babbler, "--rules", "host", "--dry-run", *arguments)
    assert (done.code, done.out) == (1, "")
    assert expected in done.err


def test_good_options_change_nothing_and_leave_nothing(call: Call, babbler: Path, tmp_path: Path) -> None:
    plain = ("chat", babbler, "--rules", "host", "--dry-run", "--host-memory", "8GiB")
    trace = tmp_path / "trace.json"
    done = call(*plain, "-p", "hi", "-p", "-", "--trace", trace, "--seed", "7", stdin=b"\xff")  # it is not read
    expected = call(*plain).out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert [line for line in done.out.splitlines() if "here are" not in line] == [
        line for line in expected if "here are" not in line
    ]
    assert not trace.exists()


def test_a_host_is_described_for_a_dry_run_alone(call: Call, babbler: Path) -> None:
    done = call("chat", babbler, "--host-memory", "8GiB", "-p", "hi")
    assert (done.code, done.out) == (2, "")
    assert "--dry-run" in done.err


def test_the_twin_is_planned_and_can_be_loaded(call: Call, babbler: Path) -> None:
    done = call("chat", babbler, "--rules", "twin", "--dry-run")
    assert done.code == 0
    answered = call("chat", babbler, "--rules", "twin", "-p", "hi", "--max-tokens", "3")
    assert answered.code == 0


def test_hot_experts_on_the_twin_are_planned_and_can_be_loaded(
    call: Call, babbler: Path, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing is known there
    hot = "  - {what: routed_experts, on: gpu, hottest: 2}\n"
    card.write_text(CARD.replace("gpu: cuda:0, gpu_memory: 24GiB", "gpu: twin") + hot)
    done = call("chat", babbler, "--rules", card, "--dry-run")
    assert done.code == 0
    assert "\n2 hottest experts  1..2 " in done.out
    assert "\nnote: hottest: which experts are used most is not known here yet" in done.out
    answered = call("chat", babbler, "--rules", card, "-p", "hi", "--max-tokens", "3")
    assert answered.code == 0
    assert "note: hottest" not in call("chat", babbler, "--rules", card, "--dry-run").out, "it is known from now on"


@pytest.mark.parametrize("size", [16, 24, 32, 48, 80])
def test_the_rules_for_cards_plan_the_published_configuration(call: Call, kimi_data: Path, size: int) -> None:
    done = call("chat", kimi_data, "--rules", f"gpu{size}", "--dry-run", "--host-memory", "576GiB", "--json")
    assert (done.code, done.err) == (0, "")
    plan = json.loads(done.out)
    assert f"planned for a card of {size}.00 GiB" in " ".join(plan["notes"])
    card = plan["devices"]["cuda:0"]
    assert 0.93 * card["budget"] < card["bytes"] <= card["budget"]
    parts = [*plan["groups"], plan["kv_cache"], *plan["overheads"]]
    assert card["bytes"] == sum(part["bytes"] for part in parts if part["device"] == "cuda:0")

"""The check of a vision tower on a GPU: a sound one passes, a fault anywhere in it is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import EngineError
from hybrid_k2.model import vision_loading
from hybrid_k2.model.vision import VisionModel
from hybrid_k2.model.vision_check import check_vision, vision_difference
from hybrid_k2.model.vision_loading import load_vision_model
from hybrid_k2.placement import Plan
from tests.generators import write_checkpoint
from tests.models import make_test_plan

Fault = Callable[[VisionModel], None]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    before = random.getstate()
    random.seed(1)
    yield
    random.setstate(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, seed=3, num_hidden_layers=1)


@pytest.fixture
def checkpoint(folder: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(folder) as opened:
        yield opened


def loaded_on(checkpoint: Checkpoint, device: str, rules: str = "host") -> tuple[VisionModel, Plan]:
    """Load it on the host; the plan names another device."""
    config = ModelConfig.load(checkpoint.folder)
    plan = make_test_plan(checkpoint, config, rules)
    model = load_vision_model(checkpoint, config, plan, lambda nbytes: None)
    assert model is not None
    rows = tuple(replace(row, device=device) if row.what == "vision" else row for row in plan.rows)
    return model, replace(plan, rows=rows)


def swap_halves(model: VisionModel) -> None:
    weight = model.blocks[0].wqkv.weight
    weight.copy_(weight.roll(len(weight) // 3, 0))


def lose_a_norm(model: VisionModel) -> None:
    model.final_norm.weight.fill_(1)


def lose_a_bias(model: VisionModel) -> None:
    for block in model.blocks:
        block.fc0.bias.zero_()


def shift_positions(model: VisionModel) -> None:
    model.positions.copy_(model.positions.roll(1, 1))


def damage_one_row(model: VisionModel) -> None:
    model.projector.outer.weight[5].mul_(4)


def poison(model: VisionModel) -> None:
    model.embed.weight[3, 3] = float("nan")


@pytest.mark.parametrize("bf16", [True, False])
def test_a_sound_tower_agrees(checkpoint: Checkpoint, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room, time after time, with products in bf16 as on a GPU, and in fp32."""
    monkeypatch.setattr(vision_loading, "cpu_flags", lambda: frozenset({"avx512_bf16"}) if bf16 else frozenset())
    model, plan = loaded_on(checkpoint, "cuda:0")
    for _ in range(5):
        assert vision_difference(model, checkpoint, "bf16").share < 0.7
    check_vision(model, checkpoint, plan)


@pytest.mark.parametrize("fault", [swap_halves, lose_a_norm, lose_a_bias, shift_positions, damage_one_row, poison])
def test_a_fault_is_refused(checkpoint: Checkpoint, fault: Fault) -> None:
    model, plan = loaded_on(checkpoint, "cuda:0")
    fault(model)
    with pytest.raises(
        EngineError, match=r"^self-check: vision on cuda:0: expected to differ .* at most .*, got "
    ) as error:
        check_vision(model, checkpoint, plan)
    assert "on: host" in (error.value.hint or "")
    check_vision(model, checkpoint, replace(plan, rules=replace(plan.rules, self_check=False)))


def test_a_kernel_that_fails_is_an_error_of_the_tower(checkpoint: Checkpoint) -> None:
    model, plan = loaded_on(checkpoint, "cuda:0")
    model.embed = replace(model.embed, weight=torch.zeros(48, 5))
    with pytest.raises(EngineError, match=r"^self-check: vision on cuda:0: "):
        check_vision(model, checkpoint, plan)


def test_the_host_is_not_checked(checkpoint: Checkpoint) -> None:
    for device in ("host", "twin"):
        model, plan = loaded_on(checkpoint, device)
        poison(model)
        check_vision(model, checkpoint, plan)

"""The check before a model serves: a sound one passes, a fault in any part is refused by the part's name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_k2.accelerator import Handoff, SubmitHandoff
from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.config import ModelConfig
from hybrid_k2.engine import Engine, loading
from hybrid_k2.errors import EngineError, RulesError
from hybrid_k2.model.layer import Layer
from hybrid_k2.model.loader import load_text_model
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.self_check import SelfCheck, self_check
from hybrid_k2.model.text import TextModel
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import Plan, Rules, parse_rules
from tests.conftest import REPO
from tests.generators import write_checkpoint
from tests.models import Loaded, loaded, make_test_plan

needs_native = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")

BLOCKS = {"num_hidden_layers": 4, "q_lora_rank": 64, "qk_rope_head_dim": 32}
PARTS = {"embedding", "attention", "dense_mlp", "router", "shared_experts", "routed_experts", "lm_head"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checked"), seed=5, **BLOCKS)


@pytest.fixture(scope="module")
def twin(folder: Path) -> Iterator[Loaded]:
    with loaded(folder, "twin", twin_threads=1) as model:
        yield model


def check(folder: Path, model: Loaded, budget_s: float = 60.0) -> SelfCheck:
    with Checkpoint.open(folder) as checkpoint:
        return self_check(model.model, checkpoint, model.config, model.plan, budget_s)


def names(done: SelfCheck) -> set[str]:
    return {found.part for found in done.findings}


@needs_native
def test_a_sound_model_agrees_in_all_parts(folder: Path, twin: Loaded) -> None:
    """With room: errors are far below what is allowed, time after time."""
    for _ in range(5):
        done = check(folder, twin)
        assert names(done) == PARTS
        assert {found.layer for found in done.findings} >= {None, 0, 1}
        assert {found.device for found in done.findings if found.part != "embedding"} == {"twin", "host"}
        assert max(max(found.placed.share, found.host.share) for found in done.findings) < 0.5
        assert 1e-5 < max(found.placed.error for found in done.findings) < 2e-2
        assert not done.left_out


@pytest.mark.parametrize("rules", ["host", "reference"])
def test_other_plans_agree_too(folder: Path, rules: str) -> None:
    with loaded(folder, rules) as model:
        assert names(check(folder, model)) == PARTS


@pytest.mark.parametrize("numerics", ["fast", "bf16"])
@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp32"])
def test_any_numerics_and_dtype_agree(folder: Path, numerics: str, dtype: str) -> None:
    text = (REPO / "rules" / "twin.yaml").read_text().replace("numerics: exact", f"numerics: {numerics}")
    for group in ("attention: ", "dense_mlp", "shared_experts", "lm_head"):
        text = re.sub(rf"(what: {group}, *on: gpu, *dtype:) bf16", rf"\1 {dtype}", text)
    with loaded(folder, parse_rules(text), twin_threads=1) as model:
        for _ in range(3):
            done = check(folder, model)
            assert max(max(found.placed.share, found.host.share) for found in done.findings) < 0.7


# Faults, planted in a sound model: each is of one part


def moe(model: Loaded, layer: int) -> Moe:
    mlp = model.model.layers[layer].mlp
    assert isinstance(mlp, Moe)
    return mlp


def in_layer(layer: int, change: Callable[[Layer], Layer]) -> Callable[[Loaded], None]:
    def plant(model: Loaded) -> None:
        model.model.layers[layer] = change(model.model.layers[layer])

    return plant


def in_attention(layer: int, **changes: Callable[[Any], Any]) -> Callable[[Loaded], None]:
    def change(whole: Layer) -> Layer:
        parts = {name: edit(getattr(whole.attention, name)) for name, edit in changes.items()}
        return replace(whole, attention=replace(whole.attention, **parts))

    return in_layer(layer, change)


def in_moe(**changes: Callable[[Any], Any]) -> Callable[[Loaded], None]:
    def change(whole: Layer) -> Layer:
        return replace(
            whole, mlp=replace(whole.mlp, **{name: f(getattr(whole.mlp, name)) for name, f in changes.items()})
        )

    return in_layer(1, change)


class Faulty(Handoff):
    """Pass on what the hand-off gives, after a change."""

    def __init__(self, inner: Handoff, swapped: bool = False, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.inner, self.swapped, self.change = inner, swapped, change

    def post(self, slot: int, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        self.inner.post(slot, layer, hidden, ids, weights)

    def take(self, slot: int, layer: int) -> Tensor:
        return self.change(self.inner.take(slot ^ self.swapped, layer))

    def reset(self) -> None:
        self.inner.reset()

    def close(self) -> None:
        self.inner.close()


def hand_off(**how: Any) -> Callable[[Loaded], None]:
    def plant(model: Loaded) -> None:
        model.model.handoff = Faulty(model.model.handoff, **how)

    return plant


def other_layer(model: Loaded) -> None:
    """The experts of another layer."""
    experts = {1: moe(model, 2).experts, 2: moe(model, 2).experts, 3: moe(model, 3).experts}
    model.model.handoff.close()
    model.model.handoff = SubmitHandoff(experts)


def head(change: Callable[[Tensor], Tensor]) -> Callable[[Loaded], None]:
    def plant(model: Loaded) -> None:
        whole = model.model.final_norm
        model.model.final_norm = replace(whole, weight=change(whole.weight))

    return plant


def late_row(x: Tensor) -> Tensor:
    """One row of the batch is another's."""
    x = x.clone()
    x[-1] = x[0]
    return x


def one_wrong(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[3] *= 4
    return weight


FAULTS: list[tuple[str, Callable[[Loaded], None]]] = [
    ("attention of layer 0", in_attention(0, kv_b=lambda w: w.roll(1, 0))),
    ("attention of layer 1", in_attention(1, kv_b=lambda w: w * 1.2)),
    ("attention of layer 1", in_attention(1, shape=lambda s: replace(s, scale=s.scale * 1.5), native=lambda _: None)),
    ("attention of layer 0", in_attention(0, q_a_norm=lambda norm: replace(norm, weight=one_wrong(norm.weight)))),
    ("attention of layer 0", in_layer(0, lambda whole: replace(whole, input_norm=replace(whole.input_norm, eps=1.0)))),
    ("dense_mlp of layer 0", in_layer(0, lambda w: replace(w, mlp=replace(w.mlp, gate=w.mlp.up, up=w.mlp.gate)))),  # type: ignore[arg-type,union-attr]
    ("dense_mlp of layer 0", in_layer(0, lambda w: replace(w, mlp=lambda x: late_row(w.mlp(x))))),  # type: ignore[arg-type,operator]
    ("router of layer 1", in_moe(router=lambda router: replace(router, bias=router.bias + torch.randn(16)))),
    ("router of layer 1", in_moe(router=lambda router: replace(router, scale=router.scale * 1.001))),
    ("router of layer 1", in_moe(router=lambda router: replace(router, normalise=False))),
    ("shared_experts of layer 1", in_moe(shared=lambda mlp: lambda x: mlp(x) * 1.05)),
    ("shared_experts of layer 1", in_moe(shared=lambda mlp: lambda x: mlp(x) * float("nan"))),
    ("routed_experts of layer 1", other_layer),
    ("routed_experts of layer 1", hand_off(swapped=True)),
    ("routed_experts of layer 1", hand_off(change=lambda x: x.bfloat16().float())),
    ("routed_experts of layer 1", hand_off(change=late_row)),
    ("lm_head", head(one_wrong)),
    ("lm_head", head(lambda weight: weight.roll(1))),
]


@needs_native
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_fault_is_refused_by_the_name_of_its_part(folder: Path, number: int) -> None:
    part, plant = FAULTS[number]
    with loaded(folder, "twin", twin_threads=1) as model:
        plant(model)
        with pytest.raises(EngineError, match=rf"^self-check: {part} on \w+") as caught:
            check(folder, model)
        assert "self_check: off" in (caught.value.hint or "")


# Experts on the accelerator

EXPERTS = {"hot experts", "hot experts in a prompt", "streamed experts"}


def hot_rules(hottest: int, numerics: str = "exact") -> Rules:
    text = (REPO / "rules" / "twin.yaml").read_text().replace("numerics: exact", f"numerics: {numerics}")
    hot = f"  - {{what: routed_experts, on: gpu, hottest: {hottest}}}\nkv_cache:"
    text = text.replace("stream: off", "stream: auto, copy_gbps: 4, read_gbps: 8, token_us: 3")
    return parse_rules(text.replace("kv_cache:", hot, 1))


@needs_native
@pytest.mark.parametrize("numerics", ["exact", "fast", "bf16"])
@pytest.mark.parametrize("hottest", [1, 5, 15, 16])
def test_hot_and_streamed_experts_agree(folder: Path, hottest: int, numerics: str) -> None:
    with loaded(folder, hot_rules(hottest, numerics), twin_threads=1) as model:
        done = check(folder, model)
        streamed = {"streamed experts"} if hottest < 16 else set()  # there are 16
        assert names(done) == PARTS | (EXPERTS - {"streamed experts"}) | streamed
        assert max(max(found.placed.share, found.host.share) for found in done.findings) < 0.7
        assert {found.device for found in done.findings if found.part in EXPERTS} == {"twin"}


def other_hot_experts(model: Loaded) -> None:
    """Two hot experts change places in the memory that the accelerator reads."""
    hot = moe(model, 1).hot
    assert hot is not None
    first, second = sorted(hot.experts)[:2]
    spare = next(expert for expert in range(16) if expert not in hot.experts)
    weights = {expert: hot.copy(expert) for expert in (first, second)}
    layer = hot._layer  # type: ignore[attr-defined]
    layer.replace_expert(first, spare, weights[second])
    layer.replace_expert(second, first, weights[second])
    layer.replace_expert(spare, second, weights[first])


def hot_by_prompt(model: Loaded) -> None:
    """Many rows are computed otherwise than few."""
    hot = moe(model, 1).hot
    assert hot is not None
    forward = hot.forward
    hot.forward = lambda x, ids, weights: late_row(forward(x, ids, weights)) if len(x) > 6 else forward(x, ids, weights)  # type: ignore[method-assign]


def other_copies(model: Loaded) -> None:
    """The stream brings a neighbour of each expert that it is asked for."""
    split = model.model.split
    assert split is not None
    held, copy = split.stream.on_host(1), split.stream._copy
    split.stream._copy = lambda source, expert, place: copy(source, held[held.index(expert) - 1], place)  # type: ignore[method-assign]


@needs_native
@pytest.mark.parametrize(
    ("part", "plant"),
    [
        ("hot experts of layer 1", other_hot_experts),
        ("hot experts in a prompt of layer 1", hot_by_prompt),
        ("streamed experts of layer 1", other_copies),
    ],
)
def test_a_fault_in_experts_on_the_accelerator_is_refused(
    folder: Path, part: str, plant: Callable[[Loaded], None]
) -> None:
    with loaded(folder, hot_rules(5), twin_threads=1) as model:
        plant(model)
        with pytest.raises(EngineError, match=rf"^self-check: {part} on twin"):
            check(folder, model)


@needs_native
def test_a_damaged_embedding_is_refused(folder: Path) -> None:
    with loaded(folder, "twin", twin_threads=1) as model:
        model.model.embedding = model.model.embedding.roll(1, 0)
        with pytest.raises(EngineError, match="self-check: embedding on host"):
            check(folder, model)


@needs_native
def test_what_an_operation_raises_is_refused_by_the_name_of_its_part(folder: Path) -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with loaded(folder, "twin", twin_threads=1) as model:
        in_moe(shared=lambda mlp: fail)(model)
        with pytest.raises(EngineError, match="self-check: shared_experts of layer 1 on twin: CUDA error"):
            check(folder, model)


def test_a_checkpoint_that_says_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    """The reference reads the numbers again: weights that were loaded wrongly show."""
    other = write_checkpoint(tmp_path / "other", seed=6, **BLOCKS)
    with loaded(folder, "twin", twin_threads=1) as model, pytest.raises(EngineError, match="self-check: embedding"):
        check(other, model)


def test_what_there_is_no_time_for_is_named(folder: Path, twin: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    done = check(folder, twin, budget_s=-1.0)
    assert not done.findings
    assert done.left_out[0] == "embedding"
    assert "lm_head" in done.left_out
    assert "self-check: no time left after -1 s for: embedding, attention of layer 0, " in caplog.text


# Where it runs


def plan_with(folder: Path, rules: str, tail: str = "") -> Plan:
    text = (REPO / "rules" / f"{rules}.yaml").read_text() + tail
    with Checkpoint.open(folder) as checkpoint:
        return make_test_plan(checkpoint, ModelConfig.load(folder), parse_rules(text))


def test_plans_with_an_accelerator_are_checked_unless_the_rules_say_no(folder: Path) -> None:
    assert plan_with(folder, "twin").self_check
    assert plan_with(folder, "twin", "self_check: on\n").self_check
    assert not plan_with(folder, "host").self_check
    off = plan_with(folder, "twin", "self_check: off\n")
    assert not off.self_check
    assert any(note.startswith("self_check: off") for note in off.notes)
    assert not any("self_check" in note for note in plan_with(folder, "host", "self_check: off\n").notes)
    with pytest.raises(RulesError, match="self_check: expected one of on, off, got 'yes'"):
        plan_with(folder, "twin", "self_check: yes\n")


@needs_native
def test_an_engine_with_a_fault_does_not_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And it does, with a warning, where the rules leave the check out."""
    text = (REPO / "rules" / "twin.yaml").read_text()
    monkeypatch.setattr(loading, "load_text_model", faulty := FaultyLoader())
    with pytest.raises(EngineError, match="self-check: routed_experts of layer 1"):
        Engine.load(folder, parse_rules(text))
    assert faulty.model._closed
    with Engine.load(folder, parse_rules(text + "self_check: off\n")) as engine:
        assert engine.logits([1, 2]).shape[0] == 2
    assert "self_check: off: whether the accelerator" in caplog.text
    monkeypatch.undo()
    with Engine.load(folder, parse_rules(text)) as engine:
        assert engine.logits([1, 2]).shape[0] == 2


class FaultyLoader:
    """Load, and plant a fault."""

    model: TextModel

    def __call__(self, *arguments: Any) -> TextModel:
        self.model = load_text_model(*arguments)
        self.model.handoff = Faulty(self.model.handoff, change=late_row)
        return self.model

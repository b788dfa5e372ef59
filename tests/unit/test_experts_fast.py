"""Numerics fast: the definition, the accuracy, one result whatever the batch, and the ends of the range."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hybrid_k2.experts import ExpertsRuntime, open_experts
from hybrid_k2.experts.cpu import NativeRuntime
from tests.unit.a8_oracle import a8_layer
from tests.unit.experts_common import (
    ACTIVATIONS,
    error,
    float64_layer,
    load_random_experts,
    native_runtime,
    random_routing,
    token_errors,
    usable_isas,
)

ODD_LAYER = (160, 96, 24, 6)  # hidden, moe_intermediate, experts, top-k
TOKENS = (0, 1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 36, 37, 257)
# An intermediate value just below a half in float64 and just above it in fp32 becomes the next integer, 1/127 of
# its group's largest magnitude away. A few values do; only tokens with one of them are away from the definition.
DEFINITION, ONE_STEP = 2e-6, 2e-2
ACCURACY = 2e-2


@pytest.fixture(params=usable_isas("fast"))
def runtime(request: pytest.FixtureRequest) -> Iterator[ExpertsRuntime]:
    """The kernels of each instruction set that this CPU has."""
    opened = fast_runtime(request.param)
    yield opened
    opened.close()


def fast_runtime(isa: str, threads: int = 2) -> ExpertsRuntime:
    """A runtime with numerics fast."""
    native_runtime().close()  # skips where the extension is missing
    return NativeRuntime(isa, threads, "fast")


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_kernels_compute_what_is_defined(activations: str) -> None:
    """All instruction sets on the same input: the definition takes longer than the kernels."""
    native_runtime().close()  # skips where the extension is missing
    runtimes = {isa: fast_runtime(isa) for isa in usable_isas("fast")}
    layers = {isa: runtime.make_layer(*ODD_LAYER) for isa, runtime in runtimes.items()}
    experts = load_random_experts(*layers.values())
    errors: dict[str, list[Tensor]] = {isa: [] for isa in layers}
    for tokens in TOKENS:
        hidden, (ids, weights) = ACTIVATIONS[activations](tokens, 160), random_routing(tokens, 24, 6)
        for x in (hidden, hidden.to(torch.bfloat16)):
            defined = a8_layer(experts, x, ids, weights)
            for isa, layer in layers.items():
                result = layer.forward(x, ids, weights)
                assert result.dtype == torch.float32
                errors[isa].append(token_errors(result, defined))
    for isa, every in errors.items():
        together = torch.cat(every)
        assert float(together.max()) < ONE_STEP, isa
        assert float((together < DEFINITION).double().mean()) > 0.9, isa
    for runtime in runtimes.values():
        runtime.close()


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_error_against_float64_is_small(runtime: ExpertsRuntime, activations: str) -> None:
    sizes = (2048, 512, 3, 2)
    layer, oracle = runtime.make_layer(*sizes), float64_layer(*sizes)
    load_random_experts(layer, oracle)
    hidden, (ids, weights) = ACTIVATIONS[activations](24, 2048), random_routing(24, 3, 2)
    for x in (hidden, hidden.to(torch.bfloat16)):
        result, expected = layer.forward(x, ids, weights), oracle.forward(x, ids, weights)
        assert 5e-3 < error(result, expected) < ACCURACY  # 8 bits were used, and nothing worse
        assert bool((token_errors(result, expected) < 2 * ACCURACY).all())


def test_a_row_depends_on_its_token_alone(runtime: ExpertsRuntime) -> None:
    layer = runtime.make_layer(*ODD_LAYER)
    experts = load_random_experts(layer)
    hidden, (ids, weights) = torch.randn(67, 160), random_routing(67, 24, 6)
    whole = layer.forward(hidden, ids, weights)
    rows = [layer.forward(hidden[t : t + 1], ids[t : t + 1], weights[t : t + 1]) for t in range(67)]
    assert torch.equal(torch.cat(rows), whole)
    order = torch.randperm(67)
    assert torch.equal(layer.forward(hidden[order], ids[order], weights[order]), whole[order])
    for isa in usable_isas("fast"):
        for threads in (1, 3):
            other = fast_runtime(isa, threads)
            again = other.make_layer(*ODD_LAYER)
            for number, expert in enumerate(experts):
                again.load_expert(number, expert)
            assert torch.equal(again.forward(hidden, ids, weights), whole)
            other.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**67, -3e38])
def test_a_token_without_a_packed_form_becomes_nan_and_touches_no_other(runtime: ExpertsRuntime, value: float) -> None:
    layer = runtime.make_layer(*ODD_LAYER)
    load_random_experts(layer)
    hidden, (ids, weights) = torch.randn(20, 160), random_routing(20, 24, 6)
    clean = layer.forward(hidden, ids, weights)
    hidden[7, 93] = value
    result = layer.forward(hidden, ids, weights)
    assert result.isnan().all(dim=1).tolist() == [token == 7 for token in range(20)]
    others = torch.arange(20) != 7
    assert torch.equal(result[others], clean[others])


def test_the_ends_of_the_range(runtime: ExpertsRuntime) -> None:
    layer = runtime.make_layer(64, 64, 1, 1)
    load_random_experts(layer)
    hidden = torch.randn(5, 64) * 1e-9
    hidden[1] *= 1e23  # fits, but gate * up does not
    hidden[2] = 1e-40
    hidden[3] = 2.0**-62
    hidden[4] = 2.0**-60  # fits; gate * up is about its square: zero
    result = layer.forward(hidden, torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, 1))
    assert result.isnan().all(dim=1).tolist() == [False, True, False, False, False]
    assert bool((result[2:] == 0).all())


@pytest.mark.parametrize("scale", [1e8, 1e-6])
def test_large_and_small_activations_keep_the_accuracy(runtime: ExpertsRuntime, scale: float) -> None:
    layer, oracle = runtime.make_layer(1024, 512, 2, 1), float64_layer(1024, 512, 2, 1)
    load_random_experts(layer, oracle)
    hidden, (ids, weights) = torch.randn(9, 1024) * scale, random_routing(9, 2, 1)
    assert error(layer.forward(hidden, ids, weights), oracle.forward(hidden, ids, weights)) < ACCURACY


def test_it_is_opened_by_name() -> None:
    native_runtime().close()
    opened = open_experts("fast", 1)
    assert opened.name == f"native {usable_isas('fast')[0]}, fast (A8)"
    opened.close()

"""Numerics bf16: the definition, the accuracy, and the same bits as exact on hidden states that are bf16 already."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.experts.cpu import NativeRuntime
from tests.unit.bf16_oracle import bf16_layer
from tests.unit.experts_common import (
    ACTIVATIONS,
    NOT_FINITE,
    error,
    float64_layer,
    load_random_experts,
    native_runtime,
    random_routing,
    set_bits,
    token_errors,
    usable_isas,
)

ODD_LAYER = (160, 96, 24, 6)  # hidden, moe_intermediate, experts, top-k
TOKENS = (0, 1, 2, 3, 4, 5, 7, 15, 16, 17, 33, 64, 65, 257)
# One integer of a group's 16 bits may fall the other way, where the fp32 intermediate is close to a half: for a
# single token up to 2.6e-5.
DEFINITION = 5e-5
# Rounding to bf16 has a relative error of 1.66e-3 (root mean square over mantissas). Gate and up have it independently:
# 2.35e-3 of the intermediate, up to 2.7e-3 where silu is steeper than its argument is large.
ACCURACY = 3e-3


@pytest.fixture(params=usable_isas("bf16"))
def runtime(request: pytest.FixtureRequest) -> Iterator[ExpertsRuntime]:
    """The bf16 kernels of each instruction set that this CPU has."""
    opened = bf16_runtime(request.param)
    yield opened
    opened.close()


def bf16_runtime(isa: str, threads: int = 2) -> ExpertsRuntime:
    """A runtime with numerics bf16."""
    native_runtime().close()  # skips where the extension is missing
    return NativeRuntime(isa, threads, "bf16")


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_kernels_compute_what_is_defined(activations: str) -> None:
    """All instruction sets on the same input: the definition takes longer than the kernels."""
    native_runtime().close()  # skips where the extension is missing
    runtimes = {isa: bf16_runtime(isa) for isa in usable_isas("bf16")}
    layers = {isa: runtime.make_layer(*ODD_LAYER) for isa, runtime in runtimes.items()}
    experts = load_random_experts(*layers.values())
    for tokens in TOKENS:
        hidden, (ids, weights) = ACTIVATIONS[activations](tokens, 160), random_routing(tokens, 24, 6)
        for x in (hidden, hidden.to(torch.bfloat16)):
            defined = bf16_layer(experts, x, ids, weights)
            for isa, layer in layers.items():
                result = layer.forward(x, ids, weights)
                assert result.dtype == torch.float32
                assert error(result, defined) < DEFINITION, (isa, tokens, x.dtype)
    for runtime in runtimes.values():
        runtime.close()


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_error_against_float64_is_small(runtime: ExpertsRuntime, activations: str) -> None:
    sizes = (4096, 256, 4, 2)
    layer, oracle = runtime.make_layer(*sizes), float64_layer(*sizes)
    load_random_experts(layer, oracle)
    hidden, (ids, weights) = ACTIVATIONS[activations](40, 4096), random_routing(40, 4, 2)
    result, expected = layer.forward(hidden, ids, weights), oracle.forward(hidden, ids, weights)
    assert 1e-3 < error(result, expected) < ACCURACY  # bf16 was used, and nothing worse
    assert bool((token_errors(result, expected) < 3 * ACCURACY).all())
    x = hidden.to(torch.bfloat16)
    assert error(layer.forward(x, ids, weights), oracle.forward(x, ids, weights)) < 2e-4  # as exact


@pytest.mark.parametrize("isa", usable_isas())
def test_on_bf16_hidden_states_it_has_the_bits_of_exact(runtime: ExpertsRuntime, isa: str) -> None:
    exact = native_runtime(isa)
    layer, other = runtime.make_layer(*ODD_LAYER), exact.make_layer(*ODD_LAYER)
    load_random_experts(layer, other)
    for tokens in (1, 3, 40):
        hidden, (ids, weights) = torch.randn(tokens, 160), random_routing(tokens, 24, 6)
        rounded = hidden.to(torch.bfloat16)
        expected = other.forward(rounded, ids, weights)
        assert torch.equal(layer.forward(rounded, ids, weights), expected)
        assert torch.equal(layer.forward(hidden, ids, weights), expected)
        if tokens > 1:
            assert not torch.equal(other.forward(hidden, ids, weights), expected)  # exact sees the bits that bf16 drops
    exact.close()


def test_a_row_depends_on_its_token_alone(runtime: ExpertsRuntime) -> None:
    layer = runtime.make_layer(*ODD_LAYER)
    experts = load_random_experts(layer)
    hidden, (ids, weights) = torch.randn(67, 160), random_routing(67, 24, 6)
    whole = layer.forward(hidden, ids, weights)
    rows = [layer.forward(hidden[t : t + 1], ids[t : t + 1], weights[t : t + 1]) for t in range(67)]
    assert torch.equal(torch.cat(rows), whole)
    order = torch.randperm(67)
    assert torch.equal(layer.forward(hidden[order], ids[order], weights[order]), whole[order])
    for isa in usable_isas("bf16"):
        for threads in (1, 3):
            other = bf16_runtime(isa, threads)
            again = other.make_layer(*ODD_LAYER)
            for number, expert in enumerate(experts):
                again.load_expert(number, expert)
            assert torch.equal(again.forward(hidden, ids, weights), whole)
            other.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", NOT_FINITE)
def test_a_token_that_is_not_finite_becomes_nan_and_touches_no_other(
    runtime: ExpertsRuntime, bits: int, dtype: torch.dtype
) -> None:
    layer = runtime.make_layer(*ODD_LAYER)
    load_random_experts(layer)
    hidden, (ids, weights) = torch.randn(20, 160).to(dtype), random_routing(20, 24, 6)
    clean = layer.forward(hidden, ids, weights)
    set_bits(hidden, 7, 93, bits)
    result = layer.forward(hidden, ids, weights)
    assert result.isnan().all(dim=1).tolist() == [token == 7 for token in range(20)]
    others = torch.arange(20) != 7
    assert torch.equal(result[others], clean[others])


def test_the_ends_of_the_range(runtime: ExpertsRuntime) -> None:
    layer = runtime.make_layer(64, 64, 1, 1)
    load_random_experts(layer)
    hidden = torch.randn(6, 64) * 1e-9
    edge = 254.0 * 2.0**67  # 32512 * 2^60, a bf16 number
    hidden[1, 5] = 3.4e38  # rounds to infinity
    hidden[2, 5] = edge * (1 + 2.0**-9)  # rounds up, beyond the range
    hidden[3, 5] = edge  # fits, but gate * up does not
    hidden[4] = 1e-40
    hidden[5] = 2.0**-62
    result = layer.forward(hidden, torch.zeros(6, 1, dtype=torch.int32), torch.ones(6, 1))
    assert result.isnan().all(dim=1).tolist() == [False, True, True, True, False, False]
    assert bool((result[4:] == 0).all())

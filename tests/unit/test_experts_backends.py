"""What every backend of the experts must do: accuracy, invariance, special values, errors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hybrid_k2.checkpoint import ExpertWeights
from hybrid_k2.errors import CheckpointError, EngineError
from hybrid_k2.experts import ExpertsBackend, ExpertsRuntime
from hybrid_k2.experts.numba_backend import NumbaRuntime
from hybrid_k2.experts.reference import ReferenceRuntime, expert_ffn
from tests.unit.experts_common import (
    ACTIVATIONS,
    NOT_FINITE,
    error,
    float64_layer,
    load_random_experts,
    native_runtime,
    random_expert,
    random_routing,
    random_weight,
    set_bits,
    token_errors,
    usable_isas,
)

TOKENS = (0, 1, 2, 3, 5, 6, 7, 15, 16, 17, 40, 257)
ODD_LAYER = (160, 96, 24, 6)  # hidden, moe_intermediate, experts, top-k
# A16 rounds activations to 16 bits, once per matrix: 5e-5 to 7e-5 of the output's norm. A single token of a small layer
# comes to twice the tolerance where its experts' outputs cancel. FP32 backends are at 1e-6.
TOLERANCE = 2e-4
ACCURATE = [*(f"native {isa}" for isa in usable_isas()), "numba", "reference"]
INVARIANT = ACCURATE[:-1]


@pytest.fixture(scope="module", params=ACCURATE)
def runtime(request: pytest.FixtureRequest) -> Iterator[ExpertsRuntime]:
    """Each backend that can run here."""
    opened = open_backend(request.param)
    yield opened
    opened.close()


def open_backend(name: str, threads: int = 2) -> ExpertsRuntime:
    """Open a backend by its test name."""
    if name == "numba":
        return NumbaRuntime(threads)
    return ReferenceRuntime() if name == "reference" else native_runtime(name.removeprefix("native "), threads)


def make(runtime: ExpertsRuntime, *sizes: int) -> tuple[ExpertsBackend, ExpertsBackend]:
    """A layer with random experts, and the float64 oracle with the same."""
    layer, oracle = runtime.make_layer(*sizes), float64_layer(*sizes)
    load_random_experts(layer, oracle)
    return layer, oracle


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_error_against_float64_is_small(runtime: ExpertsRuntime, activations: str) -> None:
    layer, oracle = make(runtime, *ODD_LAYER)
    for tokens in TOKENS:
        hidden = ACTIVATIONS[activations](tokens, 160)
        ids, weights = random_routing(tokens, 24, 6)
        for x in (hidden, hidden.to(torch.bfloat16)):
            result = layer.forward(x, ids, weights)
            assert result.shape == (tokens, 160)
            assert result.dtype == torch.float32
            expected = oracle.forward(x, ids, weights)
            assert error(result, expected) < TOLERANCE
            assert bool((token_errors(result, expected) < 2 * TOLERANCE).all())


def test_the_error_on_a_wider_layer_is_small(runtime: ExpertsRuntime) -> None:
    layer, oracle = make(runtime, 1024, 512, 2, 2)
    hidden, (ids, weights) = torch.randn(3, 1024), random_routing(3, 2, 2)
    assert error(layer.forward(hidden, ids, weights), oracle.forward(hidden, ids, weights)) < TOLERANCE


@pytest.mark.parametrize("sizes", [(32, 32, 1, 1), (416, 224, 3, 2), (64, 288, 5, 5)])
def test_other_sizes(runtime: ExpertsRuntime, sizes: tuple[int, int, int, int]) -> None:
    layer, oracle = make(runtime, *sizes)
    hidden, (ids, weights) = torch.randn(9, sizes[0]), random_routing(9, sizes[2], sizes[3])
    assert error(layer.forward(hidden, ids, weights), oracle.forward(hidden, ids, weights)) < TOLERANCE


def test_one_expert_gets_every_token_and_others_none(runtime: ExpertsRuntime) -> None:
    layer, oracle = make(runtime, 96, 64, 7, 1)
    hidden, weights = torch.randn(83, 96), torch.rand(83, 1) + 0.1
    ids = torch.full((83, 1), 4, dtype=torch.int32)
    assert error(layer.forward(hidden, ids, weights), oracle.forward(hidden, ids, weights)) < TOLERANCE


def test_an_expert_named_twice_counts_twice(runtime: ExpertsRuntime) -> None:
    layer, oracle = make(runtime, 96, 64, 3, 3)
    hidden, weights = torch.randn(11, 96), torch.rand(11, 3) + 0.1
    ids = torch.tensor([[2, 0, 2]], dtype=torch.int32).repeat(11, 1)
    assert error(layer.forward(hidden, ids, weights), oracle.forward(hidden, ids, weights)) < TOLERANCE


@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(name: str, dtype: torch.dtype) -> None:
    runtime = open_backend(name)
    layer, _ = make(runtime, *ODD_LAYER)
    hidden, (ids, weights) = torch.randn(67, 160).to(dtype), random_routing(67, 24, 6)
    whole = layer.forward(hidden, ids, weights)

    def parts(*bounds: int) -> Tensor:
        slices = [slice(a, b) for a, b in pairwise(bounds)]
        return torch.cat([layer.forward(hidden[s], ids[s], weights[s]) for s in slices])

    assert torch.equal(parts(*range(68)), whole)
    assert torch.equal(parts(0, 2, 5, 11, 18, 33, 67), whole)
    order = torch.randperm(67)
    assert torch.equal(layer.forward(hidden[order], ids[order], weights[order]), whole[order])
    columns = torch.randperm(6)
    assert torch.equal(layer.forward(hidden, ids[:, columns], weights[:, columns]), whole)
    runtime.close()


@pytest.mark.parametrize("name", INVARIANT)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    sizes = (160, 96, 8, 3)
    hidden, (ids, weights) = torch.randn(50, 160), random_routing(50, 8, 3)
    experts = load_random_experts(float64_layer(*sizes))
    results = []
    for threads in (1, 2, 3, 5):
        runtime = open_backend(name, threads)
        layer = runtime.make_layer(*sizes)
        for number, expert in enumerate(experts):
            layer.load_expert(number, expert)
        results.append(
            torch.cat([layer.forward(hidden, ids, weights), layer.forward(hidden[:1], ids[:1], weights[:1])])
        )
        runtime.close()
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_the_instruction_sets_agree_in_every_bit() -> None:
    sizes = (416, 224, 4, 2)
    layers = [native_runtime(isa).make_layer(*sizes) for isa in usable_isas()]
    load_random_experts(*layers)

    def compare(ids: Tensor, weights: Tensor) -> None:
        hidden = torch.randn(len(ids), 416)
        first, *others = [layer.forward(hidden, ids, weights) for layer in layers]
        for other in others:
            assert torch.equal(other, first)

    for tokens in (1, 2, 30, 200):
        compare(*random_routing(tokens, 4, 2))
    for rows in range(1, 20):  # of one expert, which tokens name twice: two rows then add to one output
        ids = torch.full((2 * ((rows + 1) // 2),), 3, dtype=torch.int32)
        ids[rows:] = -1  # elsewhere
        compare(ids.view(-1, 2), torch.randn(len(ids) // 2, 2))


def test_more_tokens_than_a_chunk_of_scratch_memory() -> None:
    layer, oracle = make(native_runtime(), 64, 32, 3, 2)
    hidden, (ids, weights) = torch.randn(2500, 64), random_routing(2500, 3, 2)
    whole = layer.forward(hidden, ids, weights)
    assert error(whole, oracle.forward(hidden, ids, weights)) < TOLERANCE
    rows = torch.tensor([0, 1023, 1024, 2047, 2048, 2499])
    assert torch.equal(layer.forward(hidden[rows], ids[rows], weights[rows]), whole[rows])


@pytest.mark.parametrize("bits", NOT_FINITE)
def test_a_token_that_is_not_finite_becomes_nan_and_touches_no_other(runtime: ExpertsRuntime, bits: int) -> None:
    layer, _ = make(runtime, *ODD_LAYER)
    hidden, (ids, weights) = torch.randn(20, 160), random_routing(20, 24, 6)
    clean = layer.forward(hidden, ids, weights)
    for x in (hidden, hidden.to(torch.bfloat16)):
        set_bits(x, 7, 93, bits)
        result = layer.forward(x, ids, weights)
        assert bool(result[7].isnan().all())
        assert bool(result[torch.arange(20) != 7].isfinite().all())
        if x.dtype == torch.float32 and not isinstance(runtime, ReferenceRuntime):
            others = torch.arange(20) != 7
            assert torch.equal(result[others], clean[others])


def test_a_weight_that_is_not_finite_is_not_hidden(runtime: ExpertsRuntime) -> None:
    layer, _ = make(runtime, 64, 32, 4, 2)
    hidden, (ids, weights) = torch.randn(3, 64), random_routing(3, 4, 2)
    weights[1, 0] = torch.nan
    assert layer.forward(hidden, ids, weights).isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("isa", usable_isas())
def test_values_beyond_the_fixed_point_range_become_nan_rows(isa: str) -> None:
    layer, _ = make(native_runtime(isa), 64, 64, 2, 1)
    hidden = torch.randn(4, 64)
    hidden[1, 5] = 4e22  # above 32512 * 2^60
    hidden[2] *= 1e14  # fits, but gate * up does not
    hidden[3] *= 1e9  # fits all the way
    result = layer.forward(hidden, torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1))
    assert result.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert bool(result[[0, 3]].isfinite().all())


@pytest.mark.parametrize("scale", [1e9, 1e-9])
def test_large_and_small_activations_keep_the_accuracy(runtime: ExpertsRuntime, scale: float) -> None:
    layer, oracle = make(runtime, 160, 96, 4, 2)
    hidden, (ids, weights) = torch.randn(5, 160) * scale, random_routing(5, 4, 2)
    hidden[:, :32] *= 1e-3  # groups of different size
    expected = oracle.forward(hidden, ids, weights)
    if scale < 1:
        # The intermediate is about x * x = 1e-18 and the fixed point ends at 2^-60 = 9e-19: only its size is right.
        assert bool((layer.forward(hidden, ids, weights).abs() < 1e-16).all())
    else:
        assert error(layer.forward(hidden, ids, weights), expected) < TOLERANCE


def test_denormal_activations_are_zero_or_computed(runtime: ExpertsRuntime) -> None:
    layer, _ = make(runtime, 64, 32, 2, 1)
    hidden = torch.full((2, 64), 1e-40)
    result = layer.forward(hidden, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
    assert bool((result.abs() < 1e-30).all())


def test_non_contiguous_arguments(runtime: ExpertsRuntime) -> None:
    layer, _ = make(runtime, 64, 32, 4, 2)
    hidden, (ids, weights) = torch.randn(6, 64), random_routing(6, 4, 2)
    expected = layer.forward(hidden, ids, weights)
    result = layer.forward(hidden.T.contiguous().T, ids.T.contiguous().T, weights.T.contiguous().T)
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_named(runtime: ExpertsRuntime) -> None:
    layer, _ = make(runtime, 64, 32, 4, 2)
    hidden, (ids, weights) = torch.randn(3, 64), random_routing(3, 4, 2)
    with pytest.raises(TypeError, match=r"hidden: expected bfloat16 or float32, got torch\.float16"):
        layer.forward(hidden.to(torch.float16), ids, weights)
    with pytest.raises(TypeError, match=r"ids: expected int32, got torch\.int64"):
        layer.forward(hidden, ids.to(torch.int64), weights)
    with pytest.raises(TypeError, match=r"weights: expected float32, got torch\.float64"):
        layer.submit(0, hidden, ids, weights.to(torch.float64))
    with pytest.raises(ValueError, match=r"hidden: expected shape \[T, 64\], got \[3, 32\]"):
        layer.forward(hidden[:, :32], ids, weights)
    with pytest.raises(ValueError, match=r"hidden: expected shape \[T, 64\], got \[64\]"):
        layer.forward(hidden[0], ids, weights)
    with pytest.raises(ValueError, match=r"ids: expected shape \[3, 2\], got \[2, 2\]"):
        layer.forward(hidden, ids[:2], weights)
    with pytest.raises(ValueError, match=r"weights: expected shape \[3, 2\], got \[3, 1\]"):
        layer.forward(hidden, ids, weights[:, :1])
    for wrong in (-2, 4):  # -1 is elsewhere
        bad = ids.clone()
        bad[1, 1] = wrong
        with pytest.raises(ValueError, match=r"ids: expected experts 0\.\.3, got"):
            layer.forward(hidden, bad, weights)


def test_wrong_weights_are_named(runtime: ExpertsRuntime) -> None:
    layer = runtime.make_layer(64, 32, 4, 2)
    good = random_expert(64, 32)
    with pytest.raises(ValueError, match=r"expert: expected 0\.\.3, got 4"):
        layer.load_expert(4, good)
    with pytest.raises(ValueError, match=r"expert 1, down: expected shape \[64, 32\], got \[32, 64\]"):
        layer.load_expert(1, ExpertWeights(good.gate, good.up, good.gate))


def test_an_expert_that_was_not_loaded_is_an_error(runtime: ExpertsRuntime) -> None:
    layer = runtime.make_layer(64, 32, 4, 1)
    layer.load_expert(0, random_expert(64, 32))
    ids = torch.tensor([[0], [3]], dtype=torch.int32)
    with pytest.raises(EngineError, match="expert 3: expected it to be loaded"):
        layer.forward(torch.randn(2, 64), ids, torch.ones(2, 1))


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x4380])
def test_a_scale_that_cannot_be_computed_with_is_refused(bits: int) -> None:
    layer = native_runtime().make_layer(64, 32, 1, 1)
    expert = random_expert(64, 32)
    expert.up.scale.view(torch.uint16)[17, 1] = bits
    with pytest.raises(CheckpointError, match="up: scale of row 17, group 1: expected a finite number"):
        layer.load_expert(0, expert)
    with pytest.raises(EngineError, match="expert 0"):
        layer.forward(torch.randn(1, 64), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))


@pytest.mark.parametrize("name", INVARIANT)
def test_plain_weights_need_the_reference_backend(name: str) -> None:
    runtime = open_backend(name)
    plain = ExpertWeights(torch.randn(32, 64), torch.randn(32, 64), torch.randn(64, 32))
    with pytest.raises(ValueError, match=r"expert 0, gate: expected INT4 weights, got plain torch\.float32"):
        runtime.make_layer(64, 32, 1, 1).load_expert(0, plain)
    runtime.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_computes_plain_weights(dtype: torch.dtype) -> None:
    layer = ReferenceRuntime().make_layer(40, 24, 2, 1)  # no multiple of 32 is needed
    expert = ExpertWeights(*(torch.randn(shape).to(dtype) for shape in ((24, 40), (24, 40), (40, 24))))
    layer.load_expert(1, expert)
    hidden = torch.randn(3, 40)
    result = layer.forward(hidden, torch.ones(3, 1, dtype=torch.int32), torch.full((3, 1), 0.5))
    assert torch.allclose(result, 0.5 * expert_ffn(expert, hidden), rtol=1e-5, atol=1e-5)
    assert layer.nbytes == 3 * 24 * 40 * dtype.itemsize


def test_sizes_must_be_multiples_of_a_group() -> None:
    with pytest.raises(ValueError, match="hidden_size: expected a positive multiple of 32, got 48"):
        native_runtime().make_layer(48, 32, 1, 1)
    with pytest.raises(ValueError, match="experts: expected num_experts_per_tok >= 1, got 0"):
        native_runtime().make_layer(64, 32, 1, 0)


def test_weights_of_random_layers_use_every_nibble() -> None:
    weight = random_weight(64, 64)
    assert set(
        weight.dequantize().div(weight.scale.float().repeat_interleave(32, 1)).round().int().unique().tolist()
    ) == set(range(-8, 8))

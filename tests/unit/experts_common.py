"""Random experts and batches for the tests of the expert backends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_k2.checkpoint import ExpertWeights, PackedWeight
from hybrid_k2.experts import ExpertsBackend, ExpertsRuntime, isa_facts
from hybrid_k2.experts.cpu import NativeExperts, NativeRuntime
from hybrid_k2.experts.reference import ReferenceExperts, ReferenceRuntime
from hybrid_k2.native import NATIVE_ERROR


def random_weight(rows: int, columns: int) -> PackedWeight:
    """Every value of a nibble, -8 included, with scales of both signs as a real layer's sizes ask for."""
    packed = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int32)
    scale = (torch.rand(rows, columns // 32) + 0.5) * 0.3 / columns**0.5
    sign = torch.where(torch.rand_like(scale) < 0.1, -1.0, 1.0)
    return PackedWeight(packed, (scale * sign).to(torch.bfloat16))


def random_expert(hidden: int, intermediate: int) -> ExpertWeights:
    """One expert whose output is about as large as its input."""
    inner = (intermediate, hidden)
    return ExpertWeights(random_weight(*inner), random_weight(*inner), random_weight(*inner[::-1]))


def load_random_experts(*layers: ExpertsBackend) -> list[ExpertWeights]:
    """Load the same random experts into every layer."""
    shape = layers[0].shape
    experts = [random_expert(shape.hidden_size, shape.moe_intermediate_size) for _ in range(shape.n_routed_experts)]
    for layer in layers:
        for number, expert in enumerate(experts):
            layer.load_expert(number, expert)
    return experts


def random_routing(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Distinct experts in random order, and positive weights."""
    ids = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k].to(torch.int32)
    return ids, torch.rand(tokens, top_k) + 0.1


def usable_isas(numerics: str = "exact") -> list[str]:
    """The instruction sets that are built and that this CPU supports, with kernels for these numerics."""
    return [fact.name for fact in isa_facts() if fact.offers(numerics)]


def native_runtime(isa: str | None = None, threads: int = 2) -> ExpertsRuntime:
    """A runtime on the native kernels; skips where they are not installed."""
    if NATIVE_ERROR is not None:
        pytest.skip(f"the native extension is not installed: {NATIVE_ERROR}")
    return NativeRuntime(isa or usable_isas()[0], threads)


def native_layer(hidden: int, intermediate: int, experts: int, top_k: int, threads: int = 2) -> NativeExperts:
    """A layer on the best native kernels."""
    layer = native_runtime(threads=threads).make_layer(hidden, intermediate, experts, top_k)
    assert isinstance(layer, NativeExperts)
    return layer


def float64_layer(hidden: int, intermediate: int, experts: int, top_k: int) -> ReferenceExperts:
    """The oracle: dequantised weights, everything in float64."""
    layer = ReferenceRuntime(torch.float64).make_layer(hidden, intermediate, experts, top_k)
    assert isinstance(layer, ReferenceExperts)
    return layer


def token_errors(result: Tensor, expected: Tensor) -> Tensor:
    """The relative error of each token's output vector."""
    difference = (result.to(torch.float64) - expected).norm(dim=1)
    return difference / expected.norm(dim=1)


def error(result: Tensor, expected: Tensor) -> float:
    """The root mean square of the tokens' relative errors."""
    errors = token_errors(result, expected)
    return float(errors.square().mean().sqrt()) if len(errors) else 0.0


def _heavy_tailed(tokens: int, hidden: int) -> Tensor:
    return torch.distributions.StudentT(3.0).sample((tokens, hidden))


def _outlier_channels(tokens: int, hidden: int) -> Tensor:
    x = torch.randn(tokens, hidden)
    x[:, torch.randperm(hidden)[: max(1, hidden // 200)]] *= 30
    return x


ACTIVATIONS: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": torch.randn,
    "student-t 3": _heavy_tailed,
    "outlier channels": _outlier_channels,
}


# Infinities, and NaNs of both signs from the smallest to the largest as an integer; the upper half is a bf16 number.
NOT_FINITE = (0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8001)


def set_bits(x: Tensor, row: int, column: int, bits: int) -> None:
    """Write the bits of a float32 number, or their upper half, which a conversion might have changed."""
    half = x.dtype == torch.bfloat16
    signed = torch.tensor(bits >> 16 if half else bits)
    x.view(torch.int16 if half else torch.int32)[row, column] = signed.to(torch.int16 if half else torch.int32)

"""int8 and fp8 products against float64 on the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_k2.dense import quantize_int8

pytest.importorskip("triton", reason="triton is not installed")
from hybrid_k2.accelerator.kernels.weight_only import (
    DECODE,
    PREFILL,
    Tiling,
    WeightOnly,
    from_int8,
    quantize_fp8,
    weight_only_linear,
)


def random_weight(kind: str, rows: int, inputs: int) -> WeightOnly:
    plain = torch.randn(rows, inputs) * torch.rand(rows, 1)
    return from_int8(quantize_int8(plain)) if kind == "int8" else quantize_fp8(plain)


def on(device: torch.device, weight: WeightOnly) -> WeightOnly:
    return WeightOnly(weight.values.to(device), weight.scales.to(device))


def compare(device: torch.device, tiling: Tiling, weight: WeightOnly, x: Tensor) -> None:
    """Roundings of an element: the output's dtype; sums, and the low half of fp32 input, far below 2^-16 of the sum of
    magnitudes; in the rounded form of int8 the weights', 2^-9 each."""
    plain = weight.dequantize().double()
    expected, magnitude = x.double() @ plain.T, x.double().abs() @ plain.abs().T
    rounded = not tiling.exact and weight.scales.dtype == torch.bfloat16
    result = weight_only_linear(x.to(device), on(device, weight), tiling).cpu()
    assert result.dtype == x.dtype
    bound = magnitude * (2**-16 + (2**-9 if rounded else 0)) + expected.abs() * (
        2**-8 if x.dtype != torch.float32 else 0
    )
    assert ((result.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("tiling", "tokens", "dtype"),
    [
        (DECODE, 3, torch.bfloat16),
        (DECODE, 17, torch.float32),
        (replace(PREFILL, rows=64, tokens=32), 35, torch.bfloat16),
    ],
)
def test_equals_float64(device: torch.device, kind: str, tiling: Tiling, tokens: int, dtype: torch.dtype) -> None:
    rows, inputs = (96, 192) if tokens == 3 else (64, 96)
    compare(device, tiling, random_weight(kind, rows, inputs), torch.randn(tokens, inputs).to(dtype))


def test_layout_keeps_every_bit() -> None:
    int8 = quantize_int8(torch.randn(96, 160))
    assert torch.equal(from_int8(int8).dequantize(), int8.dequantize())
    weight = torch.randn(64, 96)
    error = (quantize_fp8(weight).dequantize() - weight).norm() / weight.norm()
    assert 0.02 < error < 0.03  # three bits of mantissa: 2^-4 / sqrt(3) of each, averaged over mantissas


def test_rows_of_zeros_and_bad_weights() -> None:
    weight = torch.randn(32, 32)
    weight[5] = 0
    assert torch.equal(quantize_fp8(weight).dequantize()[5], torch.zeros(32))
    weight[6, 7] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        quantize_fp8(weight)
    with pytest.raises(ValueError, match="multiples of 32"):
        quantize_fp8(torch.randn(40, 32))
    with pytest.raises(ValueError, match="x: expected 32 inputs, got 33"):
        weight_only_linear(torch.randn(1, 33), quantize_fp8(torch.randn(32, 32)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("rows", "inputs"), [(576, 7168), (12288, 1536), (7168, 8192)])
def test_equals_float64_at_full_width(card: torch.device, kind: str, rows: int, inputs: int) -> None:
    if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs a card from sm_89 on")
    weight = random_weight(kind, rows, inputs)
    for tiling, tokens in ((DECODE, 1), (DECODE, 16), (PREFILL, 300)):
        x = torch.randn(tokens, inputs).bfloat16()
        compare(card, tiling, weight, x)
        whole = weight_only_linear(x.to(card), on(card, weight), tiling)
        assert torch.equal(weight_only_linear(x[-1:].to(card), on(card, weight), tiling), whole[-1:])

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from hybrid_k2.model import layers
from hybrid_k2.model.layers import RmsNorm, SwiGlu, linear, rms_norm, rowwise
from tests.memory import LargestResult
from tests.reference import mla, moe

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_equals_the_oracle(scale: float) -> None:
    source = torch.Generator().manual_seed(0)
    x, weight = scale * torch.randn(5, 163, generator=source), torch.randn(163, generator=source)
    expected = mla.rms_norm(x.double(), weight.double(), 1e-5)
    # A mean of n squares, a root, two products: far fewer roundings than n matter, as they do not add up.
    torch.testing.assert_close(RmsNorm(weight, 1e-5)(x).double(), expected, rtol=16 * EPS, atol=0)


def test_rms_norm_rounds_before_it_multiplies() -> None:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(64, 96, generator=source).bfloat16()
    weight = torch.randn(96, generator=source).bfloat16()
    wide = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    once = (wide * weight.float()).bfloat16()
    twice = wide.bfloat16() * weight
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    assert (got == twice).float().mean() > 0.999  # rsqrt may differ in the last fp32 bit
    assert (once != twice).float().mean() > 0.05  # the other order would be seen


def test_rms_norm_keeps_the_dtype_of_the_residual() -> None:
    weight = torch.rand(8, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert rms_norm(torch.ones(2, 8), weight, 1e-6).dtype == torch.float32
    assert rms_norm(torch.ones(2, 8).bfloat16(), weight.float(), 1e-6).dtype == torch.bfloat16


def test_swiglu_equals_the_oracle() -> None:
    source = torch.Generator().manual_seed(3)
    gate, up = torch.randn(2, 70, 48, generator=source)
    down = torch.randn(48, 70, generator=source)
    x = torch.randn(9, 48, generator=source)
    expected = moe.swiglu(x.double(), gate, up, down)
    inner = (x.abs() @ gate.abs().T) * (x.abs() @ up.abs().T)  # bounds every sum of products, |silu(g)| <= |g|
    bound = (48 + 48 + 70 + 8) * EPS * (inner @ down.abs().T)
    got = SwiGlu(gate, up, down)(x)
    assert ((got - expected).abs() <= bound).all()


@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_linear_equals_the_oracle(
    activations: torch.dtype, weights: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.Generator().manual_seed(4)
    weight, x = torch.randn(50, 33, generator=source).to(weights), torch.randn(tokens, 33, generator=source)
    x = x.to(activations)
    computed = torch.float32 if torch.float32 in (activations, weights) else torch.bfloat16
    expected = x.double() @ weight.double().T
    bound = (33 * EPS + torch.finfo(computed).eps) * (x.double().abs() @ weight.double().abs().T)
    for numbers in (1 << 20, 33 * 50, 33 * 7, 1):  # one block, just one, several and a rest, single rows
        monkeypatch.setattr(layers, "WIDENED_NUMBERS", numbers)
        got = linear(x, weight)
        assert got.dtype == computed
        assert got.shape == (tokens, 50)
        assert ((got.double() - expected).abs() <= bound).all()


def test_widening_takes_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "WIDENED_NUMBERS", 1000)
    weight, x = torch.randn(400, 100).bfloat16(), torch.randn(2, 100)
    with LargestResult() as largest:
        linear(x, weight)
    assert 4 * 400 * 2 <= largest.nbytes <= 4 * 1000


@pytest.mark.parametrize("width", [8, 24, 64, 96, 2048, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rowwise_gives_a_row_the_same_bits_in_any_batch(width: int, dtype: torch.dtype) -> None:
    """Also where torch shares the work of a large batch between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        x = (3 * torch.randn(61, width)).to(dtype)
        for function in (torch.sigmoid, functional.silu, torch.cos):
            whole = rowwise(function, x)
            torch.testing.assert_close(whole, function(x))
            for first in range(0, 60, 7):
                for count in (1, 2, 5):
                    rows = slice(first, first + count)
                    assert torch.equal(rowwise(function, x[rows]), whole[rows])
    finally:
        torch.set_num_threads(before)


def test_rowwise_takes_rows_that_are_not_contiguous() -> None:
    x = torch.randn(50, 300)
    assert torch.equal(rowwise(torch.sigmoid, x[:, 7:107]), rowwise(torch.sigmoid, x[:, 7:107].contiguous()))

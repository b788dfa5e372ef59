from __future__ import annotations

import pytest
import torch

from hybrid_k2.model import layers
from hybrid_k2.model.layers import RmsNorm, SwiGlu, linear, rms_norm
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

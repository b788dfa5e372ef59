from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.config import ModelConfig
from hybrid_k2.dense import HostMatrix
from hybrid_k2.model.router import Router
from tests.generators import config_dict
from tests.reference import moe
from tests.unit.experts_common import native_runtime

EPS = torch.finfo(torch.float32).eps


def make_config(**overrides: object) -> ModelConfig:
    return ModelConfig.from_dict(config_dict(**overrides), "test")


def make_router(weight: Tensor | HostMatrix, bias: Tensor, config: ModelConfig) -> Router:
    return Router(weight, bias, config.num_experts_per_tok, config.norm_topk_prob, config.routed_scaling_factor)


@pytest.mark.parametrize(("experts", "top"), [(24, 6), (5, 5), (384, 8), (7, 1)])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_oracle(experts: int, top: int, normalise: bool, dtype: torch.dtype) -> None:
    config = make_config(n_routed_experts=experts, num_experts_per_tok=top, norm_topk_prob=normalise)
    source = torch.Generator().manual_seed(experts + top)
    x = torch.randn(33, 160, generator=source).to(dtype)
    weight = (torch.randn(experts, 160, generator=source) / 8).to(dtype)
    bias = torch.randn(experts, generator=source)
    routing = make_router(weight, bias, config)(x)
    assert routing.ids.shape == routing.weights.shape == (33, top)
    assert (routing.ids.dtype, routing.weights.dtype) == (torch.int32, torch.float32)
    # The scores of an expert move by at most this; a choice is only settled beyond it.
    bound = 160 * EPS * (x.double().abs() @ weight.double().abs().T).max().item()
    for token, expected in enumerate(moe.route(x, weight, bias, config)):
        ids = routing.ids[token].tolist()
        biased = ((x[token].double() @ weight.double().T).sigmoid() + bias).tolist()
        assert len(set(ids)) == top
        for wrong in set(ids) - expected.keys():
            assert biased[wrong] >= min(biased[right] for right in expected) - 2 * bound
        if set(ids) == expected.keys():
            got = dict(zip(ids, routing.weights[token].tolist(), strict=True))
            assert got == pytest.approx(expected, rel=4 * bound + 32 * EPS)


def test_best_expert_comes_first() -> None:
    config = make_config(n_routed_experts=24, num_experts_per_tok=6)
    source = torch.Generator().manual_seed(9)
    x, weight, bias = torch.randn(8, 64, generator=source), torch.randn(24, 64, generator=source) / 8, torch.zeros(24)
    assert (make_router(weight, bias, config)(x).weights.diff(dim=1) <= 0).all()


def test_bias_chooses_but_does_not_weigh() -> None:
    config = make_config(n_routed_experts=4, num_experts_per_tok=2, routed_scaling_factor=2.0)
    weight = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    routing = make_router(weight, bias, config)(torch.ones(1, 1))
    assert routing.ids.tolist() == [[3, 0]]
    scores = torch.tensor([0.0, 3.0], dtype=torch.float64).sigmoid()
    assert routing.weights[0].tolist() == pytest.approx((2 * scores / scores.sum()).tolist(), rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_ties_go_to_the_lower_index(tokens: int) -> None:
    config = make_config(n_routed_experts=40, num_experts_per_tok=7)
    bias = torch.zeros(40)
    assert (
        make_router(torch.zeros(40, 8), bias, config)(torch.ones(tokens, 8)).ids.tolist() == [list(range(7))] * tokens
    )
    bias[[11, 30, 31]] = 1.0
    ids = make_router(torch.zeros(40, 8), bias, config)(torch.ones(tokens, 8)).ids
    assert ids.tolist() == [[11, 30, 31, 0, 1, 2, 3]] * tokens


def test_scores_that_underflow_stay_finite() -> None:
    config = make_config(n_routed_experts=4, num_experts_per_tok=2)
    routing = make_router(torch.full((4, 1), -200.0), torch.zeros(4), config)(torch.ones(1, 1))
    assert routing.weights.tolist() == [[0.0, 0.0]]


def test_choice_needs_fp32_although_input_is_bf16() -> None:
    """Two experts whose scores differ by less than bf16 can tell are still told apart."""
    config = make_config(n_routed_experts=2, num_experts_per_tok=1)
    weight = torch.tensor([[1.0, 0.0], [1.0, 2.0**-12]]).bfloat16()
    router = make_router(weight, torch.zeros(2), config)
    assert router(torch.ones(1, 2).bfloat16()).ids.tolist() == [[1]]
    assert dataclasses.replace(router, weight=weight[:, :1])(torch.ones(1, 1).bfloat16()).ids.tolist() == [[0]]


@pytest.mark.parametrize(("experts", "top"), [(24, 6), (384, 8), (7, 1)])
def test_native_routing_is_that_of_fp32_and_the_same_in_any_batch(experts: int, top: int) -> None:
    config = make_config(n_routed_experts=experts, num_experts_per_tok=top)
    x = torch.randn(70, 320)
    weight = (torch.randn(experts, 320) / 18).bfloat16()
    bias = 0.1 * torch.randn(experts)
    padded = -(-experts // 32) * 32
    matrix = HostMatrix(native_runtime().native, padded, 320, "bf16")
    matrix.load_rows(0, functional.pad(weight, (0, 0, 0, padded - experts)))
    router = make_router(matrix, bias, config)
    whole = router(x)
    for _ in range(20):
        rows = torch.randperm(70)[: int(torch.randint(1, 70, ()))]
        part = router(x[rows])
        assert torch.equal(part.ids, whole.ids[rows])
        assert torch.equal(part.weights, whole.weights[rows])
    exact = (x.double() @ weight.double().T).sigmoid()
    # A chain of n fp32 sums errs by about sqrt(n) * 2^-24 of its size, here about 1; four times that is never met.
    bound = 4 * 320**0.5 * 2**-24 * 4
    kth = (exact + bias).sort(dim=1, descending=True).values[:, top - 1]
    assert ((exact + bias).gather(1, whole.ids.long()).amin(1) >= kth - bound).all()

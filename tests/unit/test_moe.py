from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from hybrid_k2.accelerator import DirectHandoff
from hybrid_k2.checkpoint import ExpertWeights
from hybrid_k2.config import ModelConfig
from hybrid_k2.dense import HostMatrix
from hybrid_k2.errors import EngineError
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.experts.reference import ReferenceRuntime
from hybrid_k2.model.layers import SwiGlu, native_of_one_kind
from hybrid_k2.model.moe import Moe, mixed
from hybrid_k2.model.router import Router
from tests.generators import config_dict
from tests.reference import moe as oracle
from tests.unit.experts_common import load_random_experts, native_runtime

SIZES = [
    {},
    {"hidden_size": 160, "moe_intermediate_size": 96, "n_routed_experts": 24, "num_experts_per_tok": 6},
    {"n_shared_experts": 3, "n_routed_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": False},
    {"n_routed_experts": 2, "num_experts_per_tok": 1, "routed_scaling_factor": 1.0},
]


@pytest.fixture
def runtime() -> Iterator[ReferenceRuntime]:
    runtime = ReferenceRuntime()
    yield runtime
    runtime.close()


def make_moe(config: ModelConfig, runtime: ReferenceRuntime) -> tuple[Moe, dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(config.n_routed_experts)
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    weights = {
        "gate": torch.randn(experts, hidden, generator=source) / hidden**0.5,
        "gate.e_score_correction_bias": 0.1 * torch.randn(experts, generator=source),
    }
    names = {"shared_experts": inner * config.n_shared_experts} | {f"experts.{e}": inner for e in range(experts)}
    for name, width in names.items():
        for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            weights[f"{name}.{part}_proj"] = torch.randn(shape, generator=source) / shape[1] ** 0.5
    backend = runtime.make_layer(hidden, inner, experts, config.num_experts_per_tok)
    for e in range(experts):
        backend.load_expert(e, ExpertWeights(*(weights[f"experts.{e}.{part}_proj"] for part in ("gate", "up", "down"))))
    router = Router(
        weights["gate"],
        weights["gate.e_score_correction_bias"],
        config.num_experts_per_tok,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )
    shared = SwiGlu(*(weights[f"shared_experts.{part}_proj"] for part in ("gate", "up", "down")))
    return Moe(router, backend, shared), weights


def output(moe: Moe, x: torch.Tensor) -> torch.Tensor:
    """Compute the layer as the schedule does."""
    handoff, routing = DirectHandoff({3: moe.experts}), moe.router(x)
    handoff.post(1, 3, x, routing.ids, routing.weights)
    return mixed(handoff.take(1, 3), moe.shared(x), x)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tokens", [1, 19])
def test_equals_the_oracle(sizes: dict[str, int], tokens: int, runtime: ReferenceRuntime) -> None:
    config = ModelConfig.from_dict(config_dict(packed=False, **sizes), "test")
    moe, weights = make_moe(config, runtime)
    x = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(tokens))
    got = output(moe, x)
    assert got.dtype == torch.float32
    expected = oracle.mixture(x, weights, config)
    # A sum of n fp32 products errs by about sqrt(n) * 2^-24 of its size; 4 follow each other, and n is at most 192.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=4 * 192**0.5 * 2**-24 * expected.abs().max().item())


def test_adds_in_the_dtype_of_the_residual(runtime: ReferenceRuntime) -> None:
    config = ModelConfig.from_dict(config_dict(packed=False), "test")
    moe, _ = make_moe(config, runtime)
    x = torch.randn(7, config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = moe.router(x)
    routed = moe.experts.forward(x, routing.ids, routing.weights)
    got = output(moe, x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, routed.bfloat16() + moe.shared(x).bfloat16())


@pytest.mark.parametrize("open_runtime", [ReferenceRuntime, native_runtime])
def test_abandoning_swallows_errors_and_empty_slots(open_runtime: Any) -> None:
    runtime: ExpertsRuntime = open_runtime()
    backend = runtime.make_layer(64, 32, 4, 2)
    batch = torch.randn(2, 64), torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2)
    backend.abandon(0)
    with suppress(EngineError):  # expert 0 was not loaded: some backends find it out while they compute
        backend.submit(0, *batch)
    backend.abandon(0)
    load_random_experts(backend)
    backend.submit(0, *batch)
    assert torch.equal(backend.wait(0), backend.forward(*batch))
    backend.close()
    runtime.close()


@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("bf16", "int8"), ("plain", "bf16")])
@pytest.mark.parametrize("tokens", [1, 7])
def test_router_and_shared_expert_in_one_go_give_the_same_bits(dtypes: tuple[str, str], tokens: int) -> None:
    """One question to the threads where all three matrices are native and of one kind, and the same without."""
    config = ModelConfig.from_dict(config_dict(hidden_size=96, moe_intermediate_size=64), "test")
    moe, weights = make_moe(config, ReferenceRuntime())
    native = native_runtime().native

    def matrix(weight: torch.Tensor, dtype: str) -> torch.Tensor | HostMatrix:
        if dtype == "plain":
            return weight
        padded = functional.pad(weight, (0, 0, 0, -len(weight) % 32))
        made = HostMatrix(native, *padded.shape, dtype)
        made.load_rows(0, padded)
        return made

    parts = [matrix(weights[f"shared_experts.{part}_proj"], dtypes[1]) for part in ("gate", "up", "down")]
    router = replace(moe.router, weight=matrix(weights["gate"], dtypes[0]))
    moe = replace(moe, router=router, shared=SwiGlu(*parts))
    x = torch.randn(tokens, config.hidden_size)
    apart, shared = moe.router(x), moe.shared(x)
    routing, share = moe.begin(x)
    assert torch.equal(routing.ids, apart.ids)
    assert torch.equal(routing.weights, apart.weights)
    assert torch.equal(share(), shared)
    joined = native_of_one_kind((moe.router.weight, moe.shared.gate, moe.shared.up))
    assert bool(joined) == (dtypes == ("bf16", "bf16"))

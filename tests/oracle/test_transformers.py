"""Logits against transformers' own model of the same weights: FP32, one forward pass over the whole sequence.

The INT4 checkpoint in the original names goes through `rules/reference.yaml`; its twin with the same weights
dequantised goes through transformers. Short prompts are compared whole and in chunks; long ones after chunked prefill
beyond 4096 tokens and 64 cached decode steps behind it.

Where two experts, or the two best logits, tie to within FP32 rounding, either choice is right and the two programs may
differ. There our router takes the experts that theirs took, so that one such row does not change all rows behind it,
and top-1 is not compared. Only a small share of the choices may differ in this way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.dense import HostMatrix
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.router import Router, Routing
from tests.generators import ROPE_SCALING, load_transformers_twin, write_checkpoint, write_transformers_twin
from tests.models import Loaded, loaded

pytest.importorskip("transformers", reason="transformers is the oracle: pip install 'hybrid-k2[test]'")

TOLERANCE = 2e-3
# What ties: sums of n products err by about sqrt(n) * 2^-24 of their size. Scores of 0..1 err by some 1e-6, and logits
# of a few units, behind some 40 such sums in a row, by some 1e-5.
EXPERTS_TIE = 1e-5
LOGITS_TIE = 5e-5
EXEMPT_SHARE = 1 / 500  # of the choices; one is always granted
DECODE_STEPS = 64
LONG = 4096 + 20
Record = Callable[[str, object], None]

CASES: dict[str, dict[str, Any]] = {
    "tiny": {"seed": 1},
    "odd-sizes": {
        "seed": 1,
        "num_hidden_layers": 5,
        "hidden_size": 160,
        "moe_intermediate_size": 96,
        "num_attention_heads": 3,
        "n_routed_experts": 24,
        "num_experts_per_tok": 6,
        "q_lora_rank": 37,
        "kv_lora_rank": 29,
        "qk_nope_head_dim": 13,
        "qk_rope_head_dim": 6,
        "v_head_dim": 11,
    },
    "one-head-two-dense-layers": {
        "seed": 1,
        "num_hidden_layers": 7,
        "first_k_dense_replace": 2,
        "num_attention_heads": 1,
        "n_shared_experts": 3,
        "norm_topk_prob": False,
        "routed_scaling_factor": 0.9,
    },
    "other-yarn-no-dense-layer": {
        "seed": 1,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 0,
        "n_routed_experts": 5,
        "num_experts_per_tok": 5,
        "rms_norm_eps": 1e-3,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
        "rope_scaling": ROPE_SCALING
        | {
            "factor": 16.0,
            "beta_fast": 1.0,
            "original_max_position_embeddings": 2048,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
        },
    },
    "wide-rope-many-experts": {
        "seed": 1,
        "vocab_size": 1000,
        "num_attention_heads": 2,
        "q_lora_rank": 130,
        "kv_lora_rank": 100,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 48,
        "n_routed_experts": 64,
        "num_experts_per_tok": 8,
    },
    "text-only": {"seed": 1, "model_type": "kimi_k2", "n_routed_experts": 11, "num_experts_per_tok": 3},
}


@dataclass
class TieBreaker:
    """Route as `router` does, but where experts tie, as the other implementation did."""

    router: Router
    theirs: Tensor  # [T, K], the experts of every row of the sequence
    rows: int = 0  # routed so far
    exempt: int = 0  # rows in which our choice gave way

    @property
    def weight(self) -> Tensor | HostMatrix:
        return self.router.weight

    def __call__(self, x: Tensor) -> Routing:
        routing = self.router(x)
        theirs = self.theirs[self.rows : self.rows + len(x)]  # [t, K]
        self.rows += len(x)
        biased = functional.linear(x, self.router.weight).sigmoid() + self.router.bias  # [t, E]
        last = biased.gather(1, routing.ids.long()).amin(1)  # [t], the score of the last one chosen
        tied = biased.gather(1, theirs).amin(1) > last - EXPERTS_TIE  # [t]
        give_way = tied & (routing.ids.sort().values != theirs.sort().values).any(1)  # [t]
        self.exempt += int(give_way.sum())
        push = torch.zeros_like(biased).scatter_(1, theirs, 2.0) * give_way[:, None]  # [t, E]
        return replace(self.router, bias=self.router.bias + push)(x)  # the bias chooses and does not weigh


@dataclass(frozen=True)
class Pair:
    """Hold one checkpoint in both implementations."""

    ours: Loaded
    theirs: Any

    def compare(self, token_ids: list[int], chunks: list[int], record: Record) -> None:
        """Compare our logits, computed in chunks, with theirs after every token, computed at once without a cache."""
        choices: list[Tensor] = []
        gates = [module for name, module in self.theirs.named_modules() if name.endswith("mlp.gate")]
        hooks = [gate.register_forward_hook(lambda *call: choices.append(call[2][2])) for gate in gates]
        with torch.inference_mode():
            expected = self.theirs(torch.tensor([token_ids]), use_cache=False).logits[0]  # [T, vocab]
        for hook in hooks:
            hook.remove()
        with self.breaking_ties(choices) as routers:
            got = self.ours.logits(token_ids, chunks)
        exempt = sum(router.exempt for router in routers)
        record("exempt_routings", exempt)
        assert exempt <= 1 + EXEMPT_SHARE * len(token_ids) * len(routers), f"{exempt} routings differ"
        check(got, expected, record)

    @contextmanager
    def breaking_ties(self, choices: list[Tensor]) -> Iterator[list[TieBreaker]]:
        """Let our layers with experts break ties by the other implementation's choices."""
        layers = self.ours.model.layers
        before = list(layers)
        mixed = [(place, layer) for place, layer in enumerate(layers) if isinstance(layer.mlp, Moe)]
        routers = [TieBreaker(layer.mlp.router, theirs) for (_, layer), theirs in zip(mixed, choices, strict=True)]
        for (place, layer), router in zip(mixed, routers, strict=True):
            layers[place] = replace(layer, mlp=replace(layer.mlp, router=router))
        try:
            yield routers
        finally:
            layers[:] = before

    def random_ids(self, count: int, seed: int) -> list[int]:
        """Draw ordinary tokens: at its image tokens the other implementation wants an image."""
        source = torch.Generator().manual_seed(seed)
        return torch.randint(self.ours.config.vocab_size - 256, (count,), generator=source).tolist()


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp("oracle")
    write_checkpoint(folder / "original", **request.param)
    theirs, report = load_transformers_twin(write_transformers_twin(folder / "original", folder / "twin"))
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with loaded(folder / "original", "reference") as ours:
        assert ours.model.experts_runtime.name == "reference, fp32"
        yield Pair(ours, theirs)


def check(got: Tensor, expected: Tensor, record: Record) -> None:
    """Compare logits and top-1 of every row, and report how close they are."""
    error = (got - expected).abs().amax(1)  # [T]
    best = expected.topk(2).values  # [T, 2]
    margin = best[:, 0] - best[:, 1]  # [T]
    differs = got.argmax(1) != expected.argmax(1)  # [T]
    wrong = (differs & (margin >= LOGITS_TIE)).nonzero().flatten().tolist()
    exempt = int((differs & (margin < LOGITS_TIE)).sum())
    facts = {
        "max_logit_error": error.max().item(),
        "worst_row": int(error.argmax()),
        "rows": len(got),
        "smallest_margin_of_top_1": margin.min().item(),
        "exempt_rows": exempt,
    }
    for name, value in facts.items():
        record(name, value)
    print(
        ", ".join(
            f"{name} {value:.2e}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
        )
    )
    assert error.max() <= TOLERANCE, f"row {facts['worst_row']} of {len(got)}: {facts}"
    assert not wrong, f"top-1 differs in rows {wrong}: {facts}"
    assert exempt <= 1 + EXEMPT_SHARE * len(got), f"top-1 differs too often: {facts}"
    assert expected.std() > 0.3, "logits are too flat for the comparison to mean something"


def random_chunks(total: int, largest: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(chance.randint(1, largest), total - sum(sizes)))
    return sizes


def test_whole_prompt(pair: Pair, record_property: Record) -> None:
    ids = pair.random_ids(200, seed=1)
    pair.compare(ids, [], record_property)


def test_chunked_prompt(pair: Pair, record_property: Record) -> None:
    ids = pair.random_ids(200, seed=2)
    pair.compare(ids, random_chunks(200, 60, seed=2), record_property)


def test_decode_beyond_4096_tokens_after_chunked_prefill(pair: Pair, record_property: Record) -> None:
    ids = pair.random_ids(LONG + DECODE_STEPS, seed=3)
    chunks = [*random_chunks(LONG, 1200, seed=3), *[1] * DECODE_STEPS]
    pair.compare(ids, chunks, record_property)


def test_only_ties_are_broken() -> None:
    """Experts 0 and 1 are the same; theirs took 1 in one row, and in another an expert that is clearly worse."""
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [-3.0, 0.0]])
    router = Router(weight, torch.zeros(4), experts_per_token=2, normalise=True, scale=3.0)
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    breaker = TieBreaker(router, torch.tensor([[2, 0], [1, 2], [2, 3]]))
    parts = [breaker(x[:1]), breaker(x[1:])]
    assert torch.cat([part.ids for part in parts]).tolist() == [[2, 0], [2, 1], [2, 0]]
    torch.testing.assert_close(torch.cat([part.weights for part in parts]), router(x).weights, rtol=1e-6, atol=0)
    assert (breaker.rows, breaker.exempt) == (3, 1)

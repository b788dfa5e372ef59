"""Logits against transformers' own model of the same weights: FP32, one forward pass over the whole sequence.

The INT4 checkpoint in the original names goes through `rules/reference.yaml`; its twin with the same weights
dequantised goes through transformers. Short prompts are compared whole and in chunks; long ones after chunked prefill
beyond 4096 tokens and 64 cached decode steps behind it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.generators import ROPE_SCALING, load_transformers_twin, write_checkpoint, write_transformers_twin
from tests.models import Loaded, loaded

pytest.importorskip("transformers", reason="transformers is the oracle: pip install 'hybrid-k2[test]'")

TOLERANCE = 2e-3
DECODE_STEPS = 64
LONG = 4096 + 20
Record = Callable[[str, object], None]

# Seeds are chosen so that in no token and layer two experts, or two best logits, tie to within FP32 rounding (about
# 1e-6): there either choice would be right, and the two implementations may differ.
CASES: dict[str, dict[str, Any]] = {
    "tiny": {"seed": 2},
    "odd-sizes": {
        "seed": 6,
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
        "seed": 2,
        "num_hidden_layers": 7,
        "first_k_dense_replace": 2,
        "num_attention_heads": 1,
        "n_shared_experts": 3,
        "norm_topk_prob": False,
        "routed_scaling_factor": 0.9,
    },
    "other-yarn-no-dense-layer": {
        "seed": 2,
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
        "seed": 2,
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
    "text-only": {"seed": 6, "model_type": "kimi_k2", "n_routed_experts": 11, "num_experts_per_tok": 3},
}


@dataclass(frozen=True)
class Pair:
    """Hold one checkpoint in both implementations."""

    ours: Loaded
    theirs: Any

    def expected(self, token_ids: list[int]) -> Tensor:
        """Compute their logits after every token, without a cache."""
        with torch.inference_mode():
            return self.theirs(torch.tensor([token_ids]), use_cache=False).logits[0]  # type: ignore[no-any-return]

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
    wrong = (got.argmax(1) != expected.argmax(1)).nonzero().flatten().tolist()
    facts = {
        "max_logit_error": error.max().item(),
        "worst_row": int(error.argmax()),
        "rows": len(got),
        "smallest_margin_of_top_1": (best[:, 0] - best[:, 1]).min().item(),
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
    assert expected.std() > 0.3, "logits are too flat for the comparison to mean something"


def random_chunks(total: int, largest: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(chance.randint(1, largest), total - sum(sizes)))
    return sizes


def test_whole_prompt(pair: Pair, record_property: Record) -> None:
    ids = pair.random_ids(200, seed=1)
    check(pair.ours.logits(ids), pair.expected(ids), record_property)


def test_chunked_prompt(pair: Pair, record_property: Record) -> None:
    ids = pair.random_ids(200, seed=2)
    check(pair.ours.logits(ids, random_chunks(200, 60, seed=2)), pair.expected(ids), record_property)


def test_decode_beyond_4096_tokens_after_chunked_prefill(pair: Pair, record_property: Record) -> None:
    ids = pair.random_ids(LONG + DECODE_STEPS, seed=3)
    chunks = [*random_chunks(LONG, 1200, seed=3), *[1] * DECODE_STEPS]
    check(pair.ours.logits(ids, chunks), pair.expected(ids), record_property)

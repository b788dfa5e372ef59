"""The random checkpoints themselves: the same for the same seed, and loadable by the transformers library."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SHARED
from tests.generators import (
    SPECIAL_TOKENS,
    load_transformers_twin,
    read_tensors,
    write_checkpoint,
    write_tokenizer,
    write_transformers_twin,
)

ODD: dict[str, Any] = {
    "num_hidden_layers": 5,
    "n_routed_experts": 24,
    "num_experts_per_tok": 6,
    "hidden_size": 160,
    "moe_intermediate_size": 96,
    "num_attention_heads": 3,
}


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    one, same, other = (
        read_tensors(write_checkpoint(tmp_path / str(i), seed=seed, shards=shards))
        for i, (seed, shards) in enumerate([(7, 1), (7, 3), (8, 1)])
    )
    assert one.keys() == same.keys() == other.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["language_model.lm_head.weight"], other["language_model.lm_head.weight"])


def test_unknown_overrides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="hiden_size"):
        write_checkpoint(tmp_path, hiden_size=64)


@pytest.mark.parametrize("vocab_size", [512, 700, 5000])
def test_tokenizer_files(tmp_path: Path, vocab_size: int) -> None:
    write_tokenizer(tmp_path, vocab_size)
    lines = [line.split() for line in (tmp_path / "tiktoken.model").read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    assert sorted(ranks.values()) == list(range(vocab_size - 256))
    assert all(bytes([byte]) in ranks for byte in range(256))
    # every longer token is one merge of two tokens of lower rank, as byte-pair encoding needs
    for token, rank in ranks.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        assert len(token) == 1 or any(max(ranks.get(a, rank), ranks.get(b, rank)) < rank for a, b in pairs), token
    added = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(i) - (vocab_size - 256): entry["content"] for i, entry in added.items()} == SPECIAL_TOKENS


def test_special_tokens_stand_as_in_the_real_tokenizer(kimi_data: Path) -> None:
    added = json.loads((kimi_data / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(i) - 163584: entry["content"] for i, entry in added.items()} == SPECIAL_TOKENS


TWINS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "odd": ODD,
    "plain, text only": {"packed": False, "model_type": "kimi_k2", "shards": 2},
}


@pytest.mark.parametrize("kind", TWINS)
def test_transformers_loads_the_twin(kind: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", seed=11, **TWINS[kind])
    model, report = load_transformers_twin(write_transformers_twin(source, tmp_path / "twin"))
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = model(torch.arange(40).view(1, -1)).logits
    assert logits.shape == (1, 40, 512)
    assert 0.5 < logits.std() < 2


def test_transformers_loads_the_twin_of_the_demo_prototype(tmp_path: Path) -> None:
    folder = SHARED / "prototypes" / "demo-model" / "checkpoint"
    if not folder.is_dir():
        pytest.skip(f"the prototype of the demo model is not at {folder}")
    _, report = load_transformers_twin(write_transformers_twin(folder, tmp_path))
    assert not any(report.values()), report

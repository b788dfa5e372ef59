"""Rows of images in a batch: what they bring takes the place of the embedding, wherever and however it is computed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.placement import Rules, parse_rules, shipped_rules
from hybrid_k2.protocol import image_token
from tests.generators import write_checkpoint
from tests.models import loaded

TWIN = """\
version: 1
devices: {gpu: twin}
place:
  - {what: embedding,      on: host}
  - {what: attention,      on: gpu}
  - {what: dense_mlp,      on: gpu}
  - {what: shared_experts, on: gpu}
  - {what: routed_experts, on: host}
  - {what: lm_head,        on: gpu}
kv_cache: {tokens: 2048}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("rows"), seed=4, num_hidden_layers=2)


@pytest.mark.parametrize(
    "rules",
    [
        shipped_rules("reference"),
        parse_rules(f"{TWIN}overlap: off\n", "x.yaml"),
        parse_rules(f"{TWIN}overlap: ping_pong\n", "x.yaml"),
        parse_rules(f"{TWIN}prefill: {{stream: auto}}\n", "x.yaml"),
    ],
    ids=["host", "one batch", "two halves", "streamed"],
)
def test_an_image_that_looks_like_text_is_read_as_that_text(folder: Path, rules: Rules) -> None:
    """The bits of a text, where some of its rows come as those of images, with what the embedding has for them."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    with loaded(folder, rules) as model:
        texts = [[chance.randrange(model.config.vocab_size) for _ in range(n)] for n in (1, 40, 3, 1, 150)]
        features, drawn = {}, []
        for digest, text in enumerate(texts):
            features[digest] = model.model.embedding[torch.tensor(text)]
            rows = [image_token(digest, row) for row in range(len(text))]
            drawn.append([chance.choice(pair) for pair in zip(text, rows, strict=True)])
        drawn[0] = [image_token(0, 0)]
        results = []
        for ids in (texts, drawn):
            cache = model.cache()
            chunks = [Chunk(own, 0, cache.pool.allocate(cache.pages_for(len(own)))) for own in ids]
            batch = Batch.build(chunks, all_logits=True, features=features)
            assert (batch.seen is None) == (ids is texts)
            results.append(model.model.forward(batch, cache))
    assert torch.equal(*results)

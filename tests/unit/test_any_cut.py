"""On native kernels a sequence may be cut anywhere: latents and logits keep their bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_k2.engine import Engine, SamplingParams
from hybrid_k2.engine.logprobs import LogprobReader
from hybrid_k2.model.batch import Batch, Chunk
from tests.engines import generated, native_engine, random_engine

ROOM = 192


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with native_engine(Path(tmp_path_factory.mktemp("model")), chunk_tokens=ROOM, tokens=2 * ROOM) as one:
        yield one


def computed(engine: Engine, ids: list[int], ends: list[int]) -> tuple[Tensor, Tensor]:
    """Compute ids in chunks with these ends; return their latents [layers, tokens, width] and the last logits."""
    cache = engine._cache
    pages = engine._prefix.allocate(cache.pages_for(len(ids)))
    try:
        start, logits = 0, torch.empty(0)
        for end in ends:
            logits = engine.loaded.text.forward(Batch.build([Chunk(ids[start:end], start, pages)]), cache)
            start = end
        latents = torch.cat([cache.read_page(page) for page in pages], dim=1)[:, : len(ids)]
    finally:
        cache.pool.free(pages)
    return latents, logits


def test_any_cut_gives_the_same_bits(engine: Engine) -> None:
    assert engine.loaded.text.any_cut
    assert engine.loaded.block_tokens == 1
    chance = random.Random()
    for _ in range(5):
        length = chance.randrange(2, ROOM)
        ids = [chance.randrange(500) for _ in range(length)]
        latents, logits = computed(engine, ids, [length])
        one_by_one = list(range(1, length + 1))
        for ends in (one_by_one, [*sorted(chance.sample(range(1, length), min(5, length - 1))), length]):
            again = computed(engine, ids, ends)
            assert torch.equal(again[0], latents), ends
            assert torch.equal(again[1], logits), ends


def test_logits_have_the_bits_of_the_reply(engine: Engine) -> None:
    """Of every token of a reply, computed with the prompt at once or one by one."""
    chance = random.Random()
    prompt = [chance.randrange(500) for _ in range(150)]
    params = SamplingParams(temperature=3.0, top_p=1.0, seed=1, max_tokens=100, ignore_eos=True, logprobs=5)
    reply = generated(engine, prompt, params)
    logits = engine.logits([*prompt, *reply.token_ids[:-1]])[len(prompt) - 1 :]
    reader = LogprobReader(engine.tokenizer, 5)
    read = [reader.read(torch.from_numpy(row), token) for row, token in zip(logits, reply.token_ids, strict=True)]
    assert read == list(reply.logprobs or ())


def test_a_reply_is_reused_to_the_token_with_a_seed_too(engine: Engine) -> None:
    chance = random.Random()
    prompt = [chance.randrange(500) for _ in range(100)]
    params = SamplingParams(temperature=3.0, seed=2, max_tokens=40, ignore_eos=True, logprobs=3)
    first = generated(engine, prompt, params)
    turn = [*prompt, *first.token_ids, 7, 8, 9]
    second = generated(engine, turn, params)
    assert second.usage.cached_tokens == 139
    engine._prefix.release()
    fresh = generated(engine, turn, params)
    assert (second.token_ids, second.logprobs) == (fresh.token_ids, fresh.logprobs)


@pytest.mark.parametrize("rules", [{"numerics": "reference"}, {"dtype": "fp32", "numerics": "exact"}])
def test_elsewhere_prompts_are_cut_into_blocks(tmp_path: Path, rules: dict[str, str]) -> None:
    with random_engine(tmp_path, rules={"dtype": "bf16", **rules}, packed=True) as engine:
        assert not engine.loaded.text.any_cut
        assert engine.loaded.block_tokens == 8  # half of a step

"""Log probabilities of a reply's tokens: against a softmax of exact sums, and through the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_k2.engine import Engine, SamplingParams
from hybrid_k2.engine.logprobs import LOWEST, LogprobReader
from hybrid_k2.errors import RequestError
from tests.engines import GREEDY, generated, random_engine
from tests.protocol_strategies import small_tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with random_engine(Path(tmp_path_factory.mktemp("model"))) as one:
        yield one


def by_definition(logits: np.ndarray) -> np.ndarray:
    """Give the log probabilities, each exponential in float64 and their sum without rounding."""
    values = [float(value) for value in logits]
    highest = max(values)
    total = math.log(math.fsum(math.exp(value - highest) for value in values))
    return np.array([value - highest - total for value in values])


@pytest.mark.parametrize("spread", [0.0, 0.1, 5.0, 1000.0])
@pytest.mark.parametrize("size", [1, 2, 33, 700])
def test_values_and_order_are_those_of_the_definition(size: int, spread: float) -> None:
    random = np.random.default_rng()
    logits = (random.standard_normal(size) * spread).round(1).astype(np.float32)  # rounded: ties are the rule
    expected = by_definition(logits)
    token = int(random.integers(size))
    for top in (0, 1, 20):
        read = LogprobReader(small_tokenizer(), top).read(torch.from_numpy(logits), token)
        assert read.token_id == token
        # Each step rounds to 2**-53 of numbers up to the spread; 1e-9 is far above that and far below any use.
        assert read.logprob == pytest.approx(max(expected[token], LOWEST), abs=1e-9)
        order = sorted(range(size), key=lambda place: (-logits[place], place))[:top]
        assert [best.token_id for best in read.top] == order
        values = [max(expected[place], LOWEST) for place in order]
        assert [best.logprob for best in read.top] == pytest.approx(values, abs=1e-9)


def test_impossible_tokens_are_a_number_that_json_can_say() -> None:
    read = LogprobReader(small_tokenizer(), 3).read(torch.tensor([0.0, -torch.inf, 0.0]), 1)
    assert read.logprob == LOWEST
    assert [best.logprob for best in read.top] == pytest.approx([-math.log(2), -math.log(2), LOWEST])


def test_bytes_are_those_of_the_token_even_of_half_a_character() -> None:
    tokenizer = small_tokenizer()
    byte = next(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"\xc3")
    read = LogprobReader(tokenizer, 0).read(torch.zeros(tokenizer.vocab_size + 3), byte)
    assert (read.text_bytes, read.to_dict()["token"]) == (b"\xc3", "\N{REPLACEMENT CHARACTER}")
    outside = LogprobReader(tokenizer, 0).read(torch.zeros(tokenizer.vocab_size + 3), tokenizer.vocab_size + 1)
    assert outside.text_bytes == b""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_read_as_they_are(dtype: torch.dtype) -> None:
    logits = torch.randn(300).to(dtype)
    read = LogprobReader(small_tokenizer(), 5).read(logits, 7)
    assert read.logprob == pytest.approx(by_definition(logits.double().numpy())[7], abs=1e-9)


def test_a_reply_has_one_for_each_token_and_they_are_the_models_own(engine: Engine) -> None:
    """What sampling parameters do to the odds does not show."""
    prompt = np.random.default_rng().integers(0, 500, 9).tolist()
    params = SamplingParams(temperature=2.0, top_k=3, repetition_penalty=1.5, logit_bias={7: 4.0}, ignore_eos=True)
    reply = generated(engine, prompt, params, max_tokens=12, logprobs=4)
    assert reply.logprobs is not None
    assert [read.token_id for read in reply.logprobs] == list(reply.token_ids)
    logits = engine.logits([*prompt, *reply.token_ids])
    for place, read in enumerate(reply.logprobs):
        expected = by_definition(logits[len(prompt) - 1 + place])
        # The engine's fp32 logits differ in their last bits between a prefill chunk and a decode step.
        assert read.logprob == pytest.approx(expected[read.token_id], abs=1e-4)
        assert [best.logprob for best in read.top] == pytest.approx(sorted(expected)[: -4 - 1 : -1], abs=1e-4)
        assert read.text_bytes == engine.tokenizer.token_bytes(read.token_id)


def test_asking_for_them_changes_no_token_and_not_asking_gives_none(engine: Engine) -> None:
    prompt = [5, 6, 7]
    plain = generated(engine, prompt, GREEDY, max_tokens=8)
    asked = generated(engine, prompt, GREEDY, max_tokens=8, logprobs=0)
    assert plain.logprobs is None
    assert asked.token_ids == plain.token_ids
    assert asked.logprobs is not None
    assert all(not read.top for read in asked.logprobs)
    written = json.loads(json.dumps(asked.to_dict()))["logprobs"]
    assert [entry["token_id"] for entry in written] == list(asked.token_ids)
    assert bytes(written[0]["bytes"]) == asked.logprobs[0].text_bytes


@pytest.mark.parametrize("size", [1, 2, 9, 64, 65, 150])
@pytest.mark.parametrize("seed", [None, 7])
def test_those_of_a_prompt_are_the_models_own_whatever_is_cached(engine: Engine, size: int, seed: int | None) -> None:
    prompt = np.random.default_rng().integers(0, 500, size).tolist()
    params = SamplingParams(temperature=0.0, ignore_eos=True, seed=seed)
    plain = generated(engine, prompt, params, max_tokens=3)
    reply = generated(engine, prompt, params, max_tokens=3, logprobs=2, prompt_logprobs=True)
    assert reply.token_ids == plain.token_ids
    assert plain.prompt_logprobs is None
    assert size == 1 or reply.usage.cached_tokens == 0
    assert reply.prompt_logprobs is not None
    assert [read.token_id for read in reply.prompt_logprobs] == prompt[1:]
    logits = engine.logits(prompt)
    for place, read in enumerate(reply.prompt_logprobs):
        expected = by_definition(logits[place])
        assert read.logprob == pytest.approx(expected[read.token_id], abs=1e-4)
        assert [best.logprob for best in read.top] == pytest.approx(sorted(expected)[: -2 - 1 : -1], abs=1e-4)
    assert len(json.loads(json.dumps(reply.to_dict()))["prompt_logprobs"]) == size - 1


def test_those_of_a_prompt_need_to_know_how_many() -> None:
    with pytest.raises(RequestError, match="prompt_logprobs: expected logprobs beside it"):
        SamplingParams(prompt_logprobs=True)
    with pytest.raises(RequestError, match="prompt_logprobs: expected True or False, got 1"):
        SamplingParams(prompt_logprobs=1, logprobs=1)  # type: ignore[arg-type]

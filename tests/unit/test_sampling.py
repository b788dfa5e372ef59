"""The sampler against a plain definition of each step in float64."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.sampling import Sampler, _first_beyond, likely_weights
from hybrid_k2.errors import EngineError


def sampler(vocab_size: int, prompt: tuple[int, ...] = (), **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params).over(SamplingParams.defaults(True)), vocab_size, prompt)


def floor_by_definition(share: np.ndarray, min_p: float, top_k: int, top_p: float) -> float:
    """Sort everything and apply min-p, top-k and top-p one after the other: the smallest share that is kept."""
    descending = np.sort(share)[::-1]
    descending = descending[descending >= min_p]
    if top_k > 0:
        descending = descending[:top_k]
    if top_p < 1:
        running = np.cumsum(descending) / descending.sum()
        descending = descending[: np.count_nonzero(running < top_p) + 1]
    return float(descending[-1])


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 40.0])
def test_the_kept_tokens_are_those_of_the_definition(spread: float) -> None:
    rng = np.random.default_rng()
    for _ in range(150):
        values = (rng.normal(size=rng.integers(1, 1500)) * spread).astype(np.float32)
        temperature = float(rng.choice([0.3, 1.0, 2.5]))
        min_p, top_k = float(rng.choice([0, 0.02, 0.5])), int(rng.choice([-1, 0, 1, 5, 100]))
        top_p = float(rng.choice([0.0, 0.1, 0.5, 0.95, 1.0]))
        weights = likely_weights(values, temperature, min_p, top_k, top_p)
        exponent = (values.astype(np.float64) - values.max()) / temperature
        share = np.exp(exponent)
        # the exponent is rounded to float32 before exp, which turns its error into a relative one
        bound = 8 * np.finfo(np.float32).eps * (1 + np.abs(exponent))
        lowest = floor_by_definition(share, min_p, top_k, min(1, top_p * (1 + bound.max()))) * (1 - bound.max())
        highest = floor_by_definition(share, min_p, top_k, top_p * (1 - bound.max())) * (1 + bound.max())
        normal = share > np.finfo(np.float32).tiny
        assert np.all(weights[normal & (share > highest)] > 0)
        assert not weights[share < lowest].any()
        assert weights.max() == 1
        drawn = (weights > 0) & normal
        assert np.all(np.abs(weights - share)[drawn] <= (share * bound)[drawn])


def test_equal_logits_share_one_fate() -> None:
    values = np.array([1, 5, 5, 0, 5, 2], np.float32)
    assert np.flatnonzero(likely_weights(values, 1.0, 0.0, 1, 1.0)).tolist() == [1, 2, 4]
    assert np.flatnonzero(likely_weights(values, 1.0, 0.0, 0, 0.1)).tolist() == [1, 2, 4]


@pytest.mark.parametrize("case", [{}, {"top_p": 1.0}, {"top_k": 3, "top_p": 1.0}, {"temperature": 0.5}])
def test_draws_follow_the_weights(case: dict[str, Any]) -> None:
    values = np.random.default_rng(11).normal(size=700).astype(np.float32) * 3
    one, logits, draws = sampler(700, seed=5, **case), torch.from_numpy(values), 4000
    counts = np.bincount([one.sample(logits) for _ in range(draws)], minlength=700)
    weights = likely_weights(values, one._temperature, one._min_p, one._top_k, one._top_p).astype(np.float64)
    expected = draws * weights / weights.sum()
    assert not counts[weights == 0].any()
    many = expected >= 5
    deviations = (counts[many] - expected[many]) / np.sqrt(expected[many])
    # chi-square with as many degrees of freedom as cells: mean n, deviation sqrt(2 n); the seed is fixed
    assert np.sum(deviations**2) < many.sum() + 5 * np.sqrt(2 * many.sum())


def test_the_whole_vocabulary_of_k26_can_be_drawn() -> None:
    """Blocks and their inner sums agree at real size: only the one token with weight is ever drawn."""
    values = np.full(163_840, -np.inf, np.float32)
    for token in (0, 511, 512, 100_000, 163_839):
        values[:] = -np.inf
        values[token] = 3.0
        assert sampler(163_840, top_p=1.0).sample(torch.from_numpy(values)) == token
    flat = torch.zeros(163_840)
    one = sampler(163_840, seed=1, top_p=1.0)
    drawn = [one.sample(flat) for _ in range(50)]
    assert min(drawn) < 20_000
    assert max(drawn) > 140_000


@pytest.mark.parametrize("size", [3, 511, 512, 513, 5000])
def test_a_draw_at_either_end_never_takes_a_dropped_token(size: int) -> None:
    """The lowest random number lies before the first kept token, and rounding may put the highest behind the last."""
    weights = np.zeros(size, np.float32)
    weights[size // 3 : size // 2 + 1] = np.random.default_rng().uniform(0.1, 1, size // 2 + 1 - size // 3)
    total = float(weights.sum(dtype=np.float64))
    assert _first_beyond(weights, 0.0, "right") == size // 3
    for target in (np.nextafter(total, 0), total, total * (1 + 1e-15)):
        assert _first_beyond(weights, float(target), "right") == size // 2


def test_same_seed_same_tokens_whatever_else_draws() -> None:
    logits = torch.randn(20, 300) * 2

    def tokens(seed: int | None) -> list[int]:
        one = sampler(300, seed=seed)
        return [one.sample(row) for row in logits]

    first = tokens(42)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    interleaved, other = sampler(300, seed=42), sampler(300, seed=43)
    again = []
    for row in logits:
        other.sample(row)
        torch.rand(3)
        again.append(interleaved.sample(row))
    assert first == again
    assert tokens(43) != first
    assert tokens(-1) != tokens(1)
    assert tokens(None) != tokens(None)


def test_a_drawn_seed_is_reported_and_repeats() -> None:
    logits = torch.randn(10, 200)
    one = sampler(200)
    tokens = [one.sample(row) for row in logits]
    two = sampler(200, seed=one.seed)
    assert [two.sample(row) for row in logits] == tokens


def test_random_numbers_do_not_change_between_versions() -> None:
    """PCG64's raw output is a published sequence: the first draws for seed 0 are fixed for good."""
    one = sampler(1000, seed=0, top_p=1.0)
    assert [one.sample(torch.zeros(1000)) for _ in range(5)] == [636, 269, 40, 16, 813]


def test_greedy_takes_the_first_of_the_highest() -> None:
    assert sampler(5, temperature=0).sample(torch.tensor([0.0, 2.0, 1.0, 2.0, -5.0])) == 1
    assert sampler(5, temperature=1e-30, seed=1).sample(torch.tensor([0.0, 2.0, 1.0, 1.9, -5.0])) == 1
    assert sampler(5, temperature=1e-320, seed=1).sample(torch.tensor([0.0, 2.0, 1.0, 1.9, -5.0])) == 1


def test_bias_and_penalties_by_definition() -> None:
    rng = np.random.default_rng()
    values = rng.normal(size=50).astype(np.float32) * 4
    prompt, reply = tuple(rng.integers(0, 50, 30).tolist()), rng.integers(0, 50, 20).tolist()
    bias = {int(token): float(rng.uniform(-9, 9)) for token in rng.choice(50, 8, replace=False)}
    one = sampler(
        50, prompt, logit_bias=bias, repetition_penalty=1.7, frequency_penalty=0.4, presence_penalty=-0.9, temperature=0
    )
    for token in reply:  # make it take exactly these, whatever they are
        forced = torch.full((50,), -1e9)
        forced[token] = 1e9
        assert one.sample(forced) == token
    expected = values.astype(np.float64)
    for token in range(50):
        expected[token] += bias.get(token, 0)
        if token in prompt or token in reply:
            expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
        expected[token] -= 0.4 * reply.count(token) - 0.9 * (token in reply)
    shifted = one._shifted(values)
    # four float32 operations on values of at most about 40
    np.testing.assert_allclose(shifted, expected, atol=4 * np.finfo(np.float32).eps * np.abs(expected).max())


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(100)
    before = logits.clone()
    sampler(100, (1, 2), repetition_penalty=2.0, logit_bias={3: 5.0}).sample(logits)
    sampler(100, top_k=3).sample(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_takes_other_float_types(dtype: torch.dtype) -> None:
    logits = torch.zeros(10, dtype=dtype)
    logits[7] = 30
    assert sampler(10).sample(logits) == 7


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = torch.zeros(100)
    logits[17] = bad
    with pytest.raises(EngineError, match=f"logits: expected finite values, got {bad} for token 17"):
        sampler(100, temperature=temperature).sample(logits)
    with pytest.raises(EngineError, match="-inf for every token"):
        sampler(100, temperature=temperature).sample(torch.full((100,), -torch.inf))


@pytest.mark.parametrize("case", [{"temperature": 0}, {}, {"top_k": 5, "min_p": 0.01}, {"repetition_penalty": 1.5}])
def test_only_allowed_tokens_are_drawn_and_as_if_there_were_no_others(case: dict[str, Any]) -> None:
    random_numbers = np.random.default_rng()
    masked, plain = sampler(700, (1, 2, 3), seed=5, **case), sampler(700, (1, 2, 3), seed=5, **case)
    for share in (0.002, 0.1, 0.9, 1.0):
        logits = torch.from_numpy(random_numbers.standard_normal(700).astype(np.float32) * 3)
        allowed = random_numbers.random(700) < share
        allowed[random_numbers.integers(700)] = True
        before = logits.clone()
        token = masked.sample(logits, allowed)
        assert allowed[token]
        assert token == plain.sample(logits.masked_fill(~torch.from_numpy(allowed), -torch.inf))
        assert torch.equal(logits, before)
    with pytest.raises(EngineError, match="-inf for every token that may come"):
        masked.sample(torch.zeros(700), np.zeros(700, np.bool_))


def test_incomplete_params_are_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="temperature: expected a value"):
        Sampler(SamplingParams(), 10)

"""SamplingParams: what is refused, what is inherited."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from hybrid_k2.engine.params import MAX_LOGPROBS, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, SamplingParams
from hybrid_k2.errors import ConfigError, RequestError, shown

HUGE = 10**6000  # more digits than Python turns into text

WRONG = [
    *((name, value) for name in ("temperature", "top_p", "min_p") for value in (-0.1, math.nan, math.inf, "1", True)),
    ("temperature", 100.5),
    ("top_p", 1.01),
    ("min_p", 2),
    ("top_k", -2),
    ("top_k", 1.5),
    ("presence_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e-38),  # would make logits infinite
    ("repetition_penalty", 10.1),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 0.5),
    ("max_tokens", 0),
    ("max_tokens", 2.0),
    ("stop", [""]),
    ("stop", ["x" * (MAX_STOP_CHARACTERS + 1)]),
    ("stop", ["x"] * (MAX_STOP_STRINGS + 1)),
    ("stop", [7]),
    ("stop", 7),
    ("stop", b"bytes"),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["1"]),
    ("stop_token_ids", 3),
    ("logit_bias", {-1: 0.0}),
    ("logit_bias", {1: 101}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: None}),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", [1]),
    ("ignore_eos", 1),
    ("include_stop", "yes"),
    ("logprobs", -1),
    ("logprobs", MAX_LOGPROBS + 1),
    ("logprobs", True),
    ("forbidden_token_ids", [-1]),
    ("min_tokens", -1),
    ("min_tokens", None),
    ("min_tokens", 1.5),
    *((name, HUGE) for name in ("temperature", "min_p", "repetition_penalty", "seed", "top_k", "max_tokens")),
    ("top_k", 2**63),
    *((name, -HUGE) for name in ("temperature", "frequency_penalty", "top_k", "max_tokens", "seed")),
    ("temperature", Fraction(10**400)),
    ("logit_bias", {1: HUGE}),
    ("logit_bias", {-HUGE: 1.0}),
    ("logit_bias", {HUGE: 101}),
    ("logit_bias", HUGE),
    ("stop_token_ids", [-HUGE]),
    ("stop", HUGE),
    ("stop", [HUGE]),
    ("ignore_eos", HUGE),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{n}={shown(v)[:12]}" for n, v in WRONG])
def test_refuses_a_wrong_value_and_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name}.*: expected .*, got ") as caught:
        SamplingParams(**{name: value})
    assert len(caught.value.message) < 300


def test_accepts_the_limits_and_other_number_types() -> None:
    SamplingParams(temperature=100, top_p=0, min_p=1, top_k=-1, presence_penalty=-2, frequency_penalty=2, seed=-(2**63))
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(3), stop_token_ids=np.array([5]), repetition_penalty=10
    )
    assert params.stop_token_ids == (5,)
    assert SamplingParams(stop="one").stop == ("one",)


def test_keeps_its_own_copy_of_collections() -> None:
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[1] = 9.0
    assert params.stop == ("a",)
    assert dict(params.logit_bias) == {1: 2.0}


def test_defaults_are_those_of_k26() -> None:
    thinking, instant = SamplingParams.defaults(True), SamplingParams.defaults(False)
    assert (thinking.temperature, thinking.top_p) == (1.0, 0.95)
    assert (instant.temperature, instant.top_p) == (0.6, 0.95)
    assert (instant.top_k, instant.min_p, instant.repetition_penalty) == (0, 0, 1)
    assert (instant.presence_penalty, instant.frequency_penalty) == (0, 0)


def test_generation_config_overrides_the_defaults_and_the_caller_overrides_both() -> None:
    stated = {"temperature": 0.2, "top_k": 7, "top_p": None, "max_length": 5, "eos_token_id": 3}
    defaults = SamplingParams.defaults(True, stated)
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.max_tokens) == (0.2, 7, 0.95, None)
    params = SamplingParams(temperature=0.9, seed=4, stop="x").over(defaults)
    assert (params.temperature, params.top_k, params.seed, params.stop) == (0.9, 7, 4, ("x",))


def test_do_sample_false_means_greedy() -> None:
    assert SamplingParams.defaults(True, {"do_sample": False, "temperature": 0.7}).temperature == 0
    assert SamplingParams.defaults(True, {"do_sample": True, "temperature": 0.7}).temperature == 0.7


@pytest.mark.parametrize("stated", [{"temperature": -1}, {"top_p": "high"}, {"top_k": 0.5}])
def test_a_bad_generation_config_is_named(stated: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {next(iter(stated))}: expected"):
        SamplingParams.defaults(True, stated)


@pytest.mark.parametrize("value", ["no", 0, [], HUGE], ids=shown)
def test_do_sample_is_true_or_false(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^/a/b\.json: do_sample: expected true or false, got "):
        SamplingParams.defaults(True, {"do_sample": value}, "/a/b.json")
    SamplingParams.defaults(True, {"do_sample": None})


def test_lengths_of_the_generation_config_are_not_read() -> None:
    assert SamplingParams.defaults(True, {"max_new_tokens": -3}) == SamplingParams.defaults(True)


@pytest.mark.parametrize(("name", "value"), [("stop_token_ids", [3, 10]), ("logit_bias", {10: 1.0})])
def test_ids_outside_the_vocabulary_are_refused(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    params.check_vocabulary(11)
    with pytest.raises(RequestError, match=rf"{name}: expected token ids from 0 to 9, got 10"):
        params.check_vocabulary(10)


@pytest.mark.parametrize(("name", "value"), [("stop_token_ids", [HUGE]), ("logit_bias", {HUGE: 1.0})])
def test_an_id_of_any_size_is_refused_by_the_vocabulary(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"{name}: expected token ids from 0 to 9, got a value too large to show"):
        SamplingParams(**{name: value}).check_vocabulary(10)

"""The parameters of sampling that the dialects of OpenAI share, and what they become for the engine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from hybrid_k2.engine.grammar import Grammar
from hybrid_k2.engine.params import MAX_STOP_STRINGS, SamplingParams
from hybrid_k2.errors import shown
from hybrid_k2.server.body import Body
from hybrid_k2.server.errors import bad_request
from hybrid_k2.server.options import Limits

StopStrings = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOP_STRINGS}]}
    ),
]


MAX_TOKEN_IDS = 4096  # of one parameter
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")


def _check_size(value: Any) -> Any:
    """Refuse what is too long before its parts are looked at. Raises: PydanticCustomError."""
    if isinstance(value, (list, dict)) and len(value) > MAX_TOKEN_IDS:
        raise PydanticCustomError("too_long", f"expected at most {MAX_TOKEN_IDS} tokens")
    return value


Bounded = BeforeValidator(_check_size)
CacheSalt = Annotated[str, Field(max_length=128)]


def cache_salt(owner: str, salt: str) -> str:
    """Return what separates cached prompts: those of one key from another's, and within a key as the client asks.

    Otherwise the time to the first token would tell one client what another one has asked.
    """
    return f"{owner}/{salt}"


class StreamOptions(Body):
    """What a stream has beside the reply."""

    include_usage: bool = False


class SamplingFields(Body):
    """The fields themselves; `SamplingParams` knows their ranges, and refuses what lies outside."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: StopStrings = None
    stop_token_ids: Annotated[list[int] | None, Bounded] = None
    logit_bias: Annotated[dict[str, float] | None, Bounded] = None
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1

    def params(
        self,
        *,
        max_tokens: int | None,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
        grammar: Grammar | None = None,
        forbidden_ids: Iterable[int] = (),
    ) -> SamplingParams:
        """Return the engine's parameters. Raises: RequestError, ApiError."""
        if not isinstance(self.stop, (str, list, type(None))):
            raise bad_request("stop", f"expected a string or a list of strings, got {shown(self.stop)}")
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=() if self.stop is None else self.stop,
            stop_token_ids=self.stop_token_ids or (),
            include_stop=self.include_stop_str_in_output,
            logit_bias=_token_bias(self.logit_bias or {}),
            forbidden_token_ids=tuple(forbidden_ids),
            min_tokens=self.min_tokens,
            prompt_logprobs=prompt_logprobs,
            max_tokens=max_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            grammar=grammar,
        )

    def check_choices(self, limits: Limits, prompts: int = 1) -> None:
        """Refuse more choices than one request may have. Raises: ApiError."""
        if prompts > limits.choices:
            raise bad_request("prompt", f"expected at most {limits.choices} prompts, got {prompts}")
        if not 1 <= self.n <= limits.choices // prompts:
            each = f" for each of {prompts} prompts" if prompts > 1 else ""
            raise bad_request("n", f"expected 1 to {limits.choices // prompts}{each}, got {shown(self.n)}")


def _token_bias(bias: Mapping[str, float]) -> dict[int, float]:
    """Read the keys of a JSON object as token ids. Raises: ApiError."""
    ids: dict[int, float] = {}
    for token, value in bias.items():
        if not _TOKEN_ID.fullmatch(token):
            raise bad_request("logit_bias", f"expected token ids as keys, got {shown(token)}")
        ids[int(token)] = value
    return ids

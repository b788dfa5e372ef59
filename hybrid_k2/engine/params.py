"""What a request may ask of the sampler, checked when it is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

from hybrid_k2.config import GENERATION_NAME
from hybrid_k2.engine.grammar import Grammar
from hybrid_k2.errors import ConfigError, RequestError, shown

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_STOP_CHARACTERS = 1024  # bounds the text that may have to be held back while a stop string is still possible
_INTEGER_BOUND = 2**63  # integers have 64 bits, as in the APIs that clients speak

# Values that a checkpoint's generation_config.json may state; a request that leaves them None takes them from there.
_INHERITED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_THINKING_TEMPERATURE = 1.0  # K2.6 model card; the hosted service fixes these values
_INSTANT_TEMPERATURE = 0.6
_TOP_P = 0.95


@dataclass(frozen=True)
class SamplingParams:
    """Say how the next token is chosen and when a reply ends; None means the model's own default.

    The order of operations on the logits is that of vLLM: `logit_bias`, repetition, frequency and presence penalty, the
    grammar, then (unless the temperature is 0, which takes the highest logit) temperature, min-p, top-k, top-p, and one
    draw.

    Raises: RequestError naming the field and its range.
    """

    temperature: float | None = None  # 0 to 100; 0 takes the most likely token
    top_p: float | None = None  # 0 to 1; keep the most likely tokens that together reach this probability
    top_k: int | None = None  # keep the k most likely tokens (and ties with the last); 0 or -1: all
    min_p: float | None = None  # 0 to 1; drop tokens less likely than this times the most likely one
    presence_penalty: float | None = None  # -2 to 2; taken from each token that the reply already has
    frequency_penalty: float | None = None  # -2 to 2; taken once for each time that the reply already has it
    repetition_penalty: float | None = None  # 0.01 to 10; divides (or multiplies) logits of tokens seen anywhere
    seed: int | None = None  # None draws one, which the reply reports
    stop: Sequence[str] = ()  # one string or several: end the reply when its content has one; it is not shown
    stop_token_ids: Sequence[int] = ()  # end the reply at one of these tokens; it is not shown
    include_stop: bool = False  # show the stop string that ended the reply
    max_tokens: int | None = None  # None: what is left of the context
    min_tokens: int = 0  # before so many tokens, neither an end token nor one of `stop_token_ids` is chosen
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> -100 to 100, added to its logit
    logprobs: int | None = None  # 0 to 20: report each token's log probability, and those of so many of the likeliest
    prompt_logprobs: bool = False  # beside `logprobs`: the same of the prompt's tokens, which are all computed then
    grammar: Grammar | None = None  # what content or tool calls must look like
    forbidden_token_ids: Sequence[int] = ()  # never chosen, whatever their logits
    ignore_eos: bool = False  # go on after the model's end tokens (for measurements)

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # collections are kept as immutable copies
        set_field(self, "stop", _stop_strings(self.stop))
        set_field(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        set_field(self, "forbidden_token_ids", _token_ids("forbidden_token_ids", self.forbidden_token_ids))
        set_field(self, "logit_bias", _logit_bias(self.logit_bias))
        _check_number("temperature", self.temperature, 0, 100)
        _check_number("top_p", self.top_p, 0, 1)
        _check_integer("top_k", self.top_k, -1, _INTEGER_BOUND - 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 10)
        _check_integer("seed", self.seed, -_INTEGER_BOUND, _INTEGER_BOUND - 1)
        _check_integer("max_tokens", self.max_tokens, 1, _INTEGER_BOUND - 1)
        _check_integer("min_tokens", self.min_tokens, 0, _INTEGER_BOUND - 1, optional=False)
        _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop", "prompt_logprobs"):
            if not isinstance(flag := getattr(self, name), bool):
                raise RequestError(f"{name}: expected True or False, got {shown(flag)}")
        if self.prompt_logprobs and self.logprobs is None:
            raise RequestError("prompt_logprobs: expected logprobs beside it, which says how many, got none")
        if not isinstance(self.grammar, (Grammar, type(None))):
            raise RequestError(f"grammar: expected a Grammar, got {shown(self.grammar)}")
        if self.grammar is not None and self.ignore_eos:
            raise RequestError("ignore_eos: expected False beside a grammar, which says where the reply ends, got True")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens: expected at most max_tokens = {self.max_tokens}, got {self.min_tokens}")

    @classmethod
    def defaults(
        cls,
        thinking: bool,
        generation_config: Mapping[str, Any] | None = None,
        source: str = GENERATION_NAME,
    ) -> SamplingParams:
        """Give the model's own values: K2.6's, overridden by what `generation_config.json` states.

        Its other keys, lengths like `max_new_tokens` among them, are not read: a reply may fill the context.
        Raises: ConfigError for a bad value in the generation config; `source` names it.
        """
        file = generation_config or {}
        given: dict[str, Any] = {name: file.get(name) for name in _INHERITED}
        do_sample = file.get("do_sample")
        if not isinstance(do_sample, (bool, type(None))):
            raise ConfigError(f"{source}: do_sample: expected true or false, got {shown(do_sample)}")
        if do_sample is False:
            given["temperature"] = 0.0  # the file format's way to ask for the most likely token
        try:
            stated = cls(**given)
        except RequestError as error:
            raise ConfigError(f"{source}: {error.message}") from None
        return stated.over(
            cls(
                temperature=_THINKING_TEMPERATURE if thinking else _INSTANT_TEMPERATURE,
                top_p=_TOP_P,
                top_k=0,
                min_p=0.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                repetition_penalty=1.0,
            )
        )

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """Return these params with the values that are None taken from `defaults`."""
        return replace(self, **{name: getattr(defaults, name) for name in _INHERITED if getattr(self, name) is None})

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the vocabulary does not have. Raises: RequestError."""
        for name in ("stop_token_ids", "forbidden_token_ids", "logit_bias"):
            for token in getattr(self, name):
                if token >= vocab_size:
                    raise RequestError(f"{name}: expected token ids from 0 to {vocab_size - 1}, got {shown(token)}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if value is None:
        return
    number = not isinstance(value, bool) and isinstance(value, Real)
    if not number or not low <= value <= high:
        raise RequestError(f"{name}: expected a number from {low} to {high}, got {shown(value)}")


def _check_integer(name: str, value: Any, low: int, high: int, *, optional: bool = True) -> None:
    if value is None and optional:
        return
    integer = not isinstance(value, bool) and isinstance(value, Integral)
    if not integer or not low <= value <= high:
        raise RequestError(f"{name}: expected an integer from {low} to {high}, got {shown(value)}")


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _as_tuple("stop", value, "strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop: expected at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            got = f"a string of {len(string)} characters" if isinstance(string, str) else shown(string)
            raise RequestError(f"stop: expected strings of 1 to {MAX_STOP_CHARACTERS} characters, got {got}")
    return strings


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = _as_tuple(name, value, "token ids")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
            raise RequestError(f"{name}: expected token ids of at least 0, got {shown(token)}")
    return tuple(int(token) for token in ids)


def _logit_bias(value: object) -> Mapping[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias: expected a mapping of token ids to numbers, got {shown(value)}")
    for token, bias in zip(_token_ids("logit_bias", value), value.values(), strict=True):
        place = f"logit_bias[{shown(token)}]"
        if bias is None:
            raise RequestError(f"{place}: expected a number from -100 to 100, got None")
        _check_number(place, bias, -100, 100)
    return MappingProxyType({int(token): float(bias) for token, bias in value.items()})


def _as_tuple(name: str, value: object, what: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RequestError(f"{name}: expected a list of {what}, got {shown(value)}")
    return tuple(value)

"""The body of a request for a text completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import WithJsonSchema

from hybrid_k2.errors import ContextLengthError, shown
from hybrid_k2.server.errors import bad_request
from hybrid_k2.server.sampling import CacheSalt, SamplingFields, StreamOptions

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_LOGPROBS = 5

Prompt = str | list[int]
Prompts = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class CompletionRequest(SamplingFields):
    """The body of a request for a completion."""

    prompt: Prompts
    model: str | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: CacheSalt = ""
    user: str | None = None

    @property
    def reads_prompt(self) -> bool:
        """Whether the log probabilities of the prompt are asked for: those of all that is echoed."""
        return self.echo and self.logprobs is not None

    def prompts(self) -> list[Prompt]:
        """Return the prompts: texts, or lists of token ids, which the engine checks. Raises: ApiError."""
        given = self.prompt
        if isinstance(given, str) or _are_ids(given):
            return [given]
        if isinstance(given, list) and given and all(isinstance(one, str) or _are_ids(one) for one in given):
            return given
        raise bad_request("prompt", f"expected a text, token ids, or a list of one of them, got {shown(given)}")

    def check(self) -> None:
        """Refuse what this server does not do. Raises: ApiError."""
        if self.suffix is not None:
            raise bad_request("suffix", "expected none: the model only continues")
        if self.best_of not in (None, self.n):
            raise bad_request("best_of", f"expected n = {self.n}, or nothing, got {shown(self.best_of)}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise bad_request("logprobs", f"expected 0 to {MAX_LOGPROBS}, got {shown(self.logprobs)}")
        if self.reads_prompt and self.stream:
            raise bad_request("logprobs", "expected no stream beside echo: those of a prompt come with the whole reply")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options", "expected stream = true beside it")


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    )


def check_ids(prompts: Sequence[Prompt], vocab_size: int, context_tokens: int) -> None:
    """Refuse token ids that the vocabulary does not have, and more than the context, before they are looked at closely.

    Raises: ApiError, ContextLengthError.
    """
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        place = f"prompt[{number}]" if len(prompts) > 1 else "prompt"
        if len(prompt) > context_tokens:
            raise ContextLengthError(f"{place}: expected at most {context_tokens} tokens, got {len(prompt)}")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise bad_request(place, f"expected token ids from 0 to {vocab_size - 1}, got {shown(wrong[0])}")

"""What a generation gives back: the reply with its counts and timings, and the event that carries it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from hybrid_k2.protocol import Event, call_type

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class ToolCall:
    """Hold one call of a tool: its id, the tool's name, and the arguments as the model wrote them (JSON text)."""

    id: str
    name: str
    arguments: str


class TopLogprob(NamedTuple):
    """Name a token, the bytes it stands for and its log probability."""

    token_id: int
    text_bytes: bytes  # of a part of a character, perhaps
    logprob: float  # natural; -9999.0 where the probability is zero

    def to_dict(self) -> dict[str, Any]:
        """Return it as the API of OpenAI writes it, and the id."""
        text = self.text_bytes.decode("utf-8", "replace")
        return {"token_id": self.token_id, "token": text, "bytes": list(self.text_bytes), "logprob": self.logprob}


@dataclass(frozen=True)
class TokenLogprob:
    """Hold what the model thought of one token of a reply, before sampling parameters changed the odds."""

    token_id: int
    text_bytes: bytes
    logprob: float
    top: tuple[TopLogprob, ...]  # the likeliest tokens, the likeliest first

    def to_dict(self) -> dict[str, Any]:
        """Return it as the API of OpenAI writes it, and the ids."""
        chosen = TopLogprob(self.token_id, self.text_bytes, self.logprob).to_dict()
        return {**chosen, "top_logprobs": [top.to_dict() for top in self.top]}


@dataclass(frozen=True)
class Usage:
    """Count the tokens of one request."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt: taken from the cache of the request before
    completion_tokens: int  # all that were generated, the reasoning and the end token included
    reasoning_tokens: int  # of the completion: before the end of the thinking


@dataclass(frozen=True)
class Timings:
    """Say how long the model took; time that the reader of the events spent is not counted. None: not meaningful."""

    prefill_s: float  # the prompt, up to and including the first token of the reply
    decode_s: float  # the other tokens
    prefill_tokens_per_s: float | None  # prompt tokens that were not cached
    decode_tokens_per_s: float | None
    memory_share: float | None  # weights read per second of decoding, as a share of the memory's read bandwidth


@dataclass(frozen=True)
class Reply:
    """Hold one finished (or cancelled) reply.

    A request that states `seed` repeats the reply bit for bit on the host's native kernels. Elsewhere it repeats the
    draws, on logits equal up to rounding.
    """

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]  # complete calls only
    finish_reason: FinishReason
    matched_stop: str | int | None  # the stop string or stop token id that ended it, if one of the request's did
    seed: int | None  # as the request stated it, or as it was drawn; None: a server drew it, and does not tell
    usage: Usage
    timings: Timings
    token_ids: tuple[int, ...] = field(repr=False)  # all that were generated
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, repr=False)  # of each of them, if asked for
    prompt_logprobs: tuple[TokenLogprob, ...] | None = field(default=None, repr=False)  # from the second token on

    def message(self) -> dict[str, Any]:
        """Return the assistant message to append to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call_type(call.name),
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists, strings and numbers, ready for `json.dumps`."""
        return {
            **asdict(self),
            "tool_calls": [asdict(call) for call in self.tool_calls],
            "token_ids": list(self.token_ids),
            "logprobs": _dicts(self.logprobs),
            "prompt_logprobs": _dicts(self.prompt_logprobs),
        }


def _dicts(logprobs: tuple[TokenLogprob, ...] | None) -> list[dict[str, Any]] | None:
    return None if logprobs is None else [logprob.to_dict() for logprob in logprobs]


@dataclass(frozen=True)
class FinishEvent(Event):
    """End a generation: the last event, of kind "finish", with the whole reply."""

    kind: Literal["finish"] = "finish"
    reply: Reply = field(kw_only=True)

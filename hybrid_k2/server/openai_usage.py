"""Counts, times and log probabilities in the words of OpenAI's clients."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from hybrid_k2.engine.reply import Reply, Timings, TokenLogprob


def new_id(prefix: str) -> str:
    """Return an id like `chatcmpl-` and 24 hexadecimal digits."""
    return f"{prefix}{secrets.token_hex(12)}"


def usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """Count the tokens of all choices; the prompt, which they share, once."""
    first = replies[0].usage
    completion = sum(reply.usage.completion_tokens for reply in replies)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "cached_tokens": first.cached_tokens,  # where clients of Moonshot's API look
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(reply.usage.reasoning_tokens for reply in replies)},
    }


def timings(reply: Reply) -> dict[str, Any]:
    """Tell the speed, with the names of llama.cpp; null where there was nothing to measure."""
    times: Timings = reply.timings
    return {
        "cache_n": reply.usage.cached_tokens,
        "prompt_n": reply.usage.prompt_tokens - reply.usage.cached_tokens,
        "prompt_ms": times.prefill_s * 1000,
        "prompt_per_second": times.prefill_tokens_per_s,
        "predicted_n": reply.usage.completion_tokens,
        "predicted_ms": times.decode_s * 1000,
        "predicted_per_second": times.decode_tokens_per_s,
    }


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Return the log probabilities of a chat's tokens: all that were generated, in order, thinking included."""
    return {"content": [token.to_dict() for token in tokens], "refusal": None}

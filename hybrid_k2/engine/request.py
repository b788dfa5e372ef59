"""From what a caller asks for to a sequence that can run: prompt, limits, sampler, parser; all checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from numbers import Integral
from types import MappingProxyType
from typing import Any

from hybrid_k2.engine.guide import Guide
from hybrid_k2.engine.loading import LoadedModel
from hybrid_k2.engine.logprobs import LogprobReader
from hybrid_k2.engine.output import Output, Parser, PlainText
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.sampling import Sampler
from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.errors import ContextLengthError, RequestError, shown
from hybrid_k2.protocol import OutputParser, canonical_history, encode_chat, expand_builtins, reply_thinks
from hybrid_k2.protocol.images import Image, is_image_token
from hybrid_k2.protocol.tokens import REPLY_ENDS, SECTION_BEGIN, THINK_END


def chat_sequences(
    loaded: LoadedModel,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    thinking: bool,
    preserve_thinking: bool,
    params: SamplingParams,
    n: int = 1,
) -> list[TokenSequence]:
    """Prepare `n` answers to a conversation; choice i of those with a seed has seed + i. Raises: RequestError."""
    messages, call_ids = canonical_history(messages)
    tools = expand_builtins(tools, thinking)
    most = loaded.config.max_position_embeddings
    ids, images = encode_chat(
        loaded.tokenizer, messages, tools, thinking, preserve_thinking, images=loaded.images, most=most
    )
    if not messages:
        raise RequestError("messages: expected at least one message, got none")
    if images and params.prompt_logprobs:
        raise RequestError("prompt_logprobs: expected a prompt of text alone, got one with images")
    thinks = reply_thinks(messages, thinking)
    special = loaded.tokenizer.special
    turn_ends = [special[name] for name in REPLY_ENDS if name in special]
    thinking_ends = [special[name] for name in (THINK_END, SECTION_BEGIN)] if thinks else []
    grammar = params.grammar
    if grammar is not None and grammar.binds == "content" and not reply_thinks(messages):
        raise RequestError("grammar: expected a reply from its beginning, got a partial message to continue")

    def parser() -> OutputParser:
        return OutputParser(loaded.tokenizer, tools, thinks, call_ids)

    return _sequences(loaded, ids, parser, turn_ends, thinking_ends, thinking, thinks, params, n, images)


def text_sequences(
    loaded: LoadedModel, prompt: str | Sequence[int], thinking: bool, params: SamplingParams, n: int = 1
) -> list[TokenSequence]:
    """Prepare `n` continuations of a text or of token ids, as `chat_sequences` does. Raises: RequestError."""
    most = loaded.config.max_position_embeddings
    ids = loaded.tokenizer.encode(prompt, most=most) if isinstance(prompt, str) else prompt
    if params.grammar is not None and params.grammar.calls:
        raise RequestError("grammar: expected one for content with a prompt, got one for tool calls")
    ids = check_ids(ids, loaded.config.vocab_size)
    return _sequences(loaded, ids, partial(PlainText, loaded.tokenizer), [], [], thinking, False, params, n)


def check_ids(token_ids: Iterable[Any], vocab_size: int) -> list[int]:
    """Return token ids as a list of ints. Raises: RequestError for none, or one that the vocabulary does not have."""
    try:
        ids = None if isinstance(token_ids, (bytes, bytearray, Set, Mapping)) else [*token_ids]
    except TypeError:  # not iterable, or an array without dimensions
        ids = None
    if ids is None:
        raise RequestError(f"prompt: expected text or token ids in their order, got {shown(token_ids)}")
    if not ids:
        raise RequestError("prompt: expected at least one token, got none")
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, Integral) or token < 0 or int(token) >= vocab_size:
            raise RequestError(f"token_ids[{place}]: expected an id from 0 to {vocab_size - 1}, got {shown(token)}")
    return [int(token) for token in ids]


def check_prompt_fits(prompt_tokens: int, loaded: LoadedModel) -> None:
    """Refuse a prompt beyond the model's context or the KV cache. Raises: ContextLengthError with both sizes."""
    context, cache = loaded.config.max_position_embeddings, loaded.plan.kv_cache.tokens
    if prompt_tokens > context:
        raise ContextLengthError(
            f"prompt: expected at most {context} tokens (the model's context), got {prompt_tokens} or more"
        )
    if prompt_tokens > cache:
        raise ContextLengthError(
            f"prompt: expected at most {cache} tokens (the size of the KV cache), got {prompt_tokens}",
            hint=_LARGER_CACHE,
        )


_LARGER_CACHE = "give kv_cache more tokens in the placement rules, e.g. kv_cache: {tokens: 131072}"


def _sequences(
    loaded: LoadedModel,
    ids: list[int],
    parser: Callable[[], Parser],
    turn_ends: Sequence[int],
    thinking_ends: Sequence[int],
    thinking: bool,
    thinks: bool,
    params: SamplingParams,
    n: int,
    images: Mapping[int, Image] = MappingProxyType({}),
) -> list[TokenSequence]:
    """Check the request once and prepare each choice.

    `thinking` chooses the default temperature; `thinks`: the reply begins with thinking.
    """
    vocab_size = loaded.config.vocab_size
    params.check_vocabulary(vocab_size)
    params = params.over(SamplingParams.defaults(thinking, loaded.generation_config))
    max_tokens, grammar = _max_tokens(params, len(ids), loaded), params.grammar
    text_ids = [token for token in ids if not is_image_token(token)] if images else ids

    def sequence(own: SamplingParams) -> TokenSequence:
        guide = None if grammar is None else Guide(grammar, loaded.guide_vocabulary, thinks)
        return TokenSequence(
            ids,
            own,
            max_tokens,
            Sampler(own, vocab_size, text_ids),
            Output(parser(), own.stop, own.include_stop),
            # K2.5 names [EOS] alone, and writes <|im_end|>
            {*loaded.config.eos_token_ids, *turn_ends, *(guide.end_ids if guide else ())},
            turn_ends,
            thinking_ends,
            loaded.block_tokens,
            None if own.logprobs is None else LogprobReader(loaded.tokenizer, own.logprobs),
            guide,
            images,
        )

    return [sequence(_of_choice(params, choice)) for choice in range(n)]


def _of_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """Give each choice a seed of its own, in 64 bits; the first one reads the prompt for all."""
    if choice == 0:
        return params
    params = replace(params, prompt_logprobs=False)
    if params.seed is None:
        return params
    return replace(params, seed=(params.seed + choice + 2**63) % 2**64 - 2**63)


def _max_tokens(params: SamplingParams, prompt_tokens: int, loaded: LoadedModel) -> int:
    check_prompt_fits(prompt_tokens, loaded)
    room = loaded.context_tokens - prompt_tokens
    if room == 0 or (params.max_tokens or 0) > room:
        smaller = loaded.context_tokens < loaded.config.max_position_embeddings
        what = "the size of the KV cache" if smaller else "the model's context"
        raise ContextLengthError(
            f"max_tokens: expected prompt and reply within {loaded.context_tokens} tokens ({what}), "
            f"got a prompt of {prompt_tokens} and max_tokens = {params.max_tokens or 1}",
            hint=_LARGER_CACHE if smaller else None,
        )
    return params.max_tokens or room

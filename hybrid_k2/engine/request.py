"""From what a caller asks for to a sequence that can run: prompt, limits, sampler, parser; all checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

from hybrid_k2.engine.guide import Guide
from hybrid_k2.engine.loading import LoadedModel
from hybrid_k2.engine.logprobs import LogprobReader
from hybrid_k2.engine.output import Output, Parser, PlainText
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.sampling import Sampler
from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.errors import ContextLengthError, RequestError, shown
from hybrid_k2.protocol import OutputParser, canonical_history, encode_prompt, expand_builtins, reply_thinks
from hybrid_k2.protocol.tokens import REPLY_ENDS, SECTION_BEGIN, THINK_END


def chat_sequence(
    loaded: LoadedModel,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    thinking: bool,
    preserve_thinking: bool,
    params: SamplingParams,
) -> TokenSequence:
    """Prepare the answer to a conversation. Raises: RequestError."""
    messages, call_ids = canonical_history(messages)
    tools = expand_builtins(tools, thinking)
    ids = encode_prompt(loaded.tokenizer, messages, tools, thinking, preserve_thinking)
    if not messages:
        raise RequestError("messages: expected at least one message, got none")
    thinks = reply_thinks(messages, thinking)
    parser = OutputParser(loaded.tokenizer, tools, thinks, call_ids)
    special = loaded.tokenizer.special
    turn_ends = [special[name] for name in REPLY_ENDS if name in special]
    thinking_ends = [special[name] for name in (THINK_END, SECTION_BEGIN)] if thinks else []
    grammar = params.grammar
    if grammar is not None and grammar.binds == "content" and not reply_thinks(messages):
        raise RequestError("grammar: expected a reply from its beginning, got a partial message to continue")
    guide = None if grammar is None else Guide(grammar, loaded.guide_vocabulary, thinks)
    return _sequence(loaded, ids, parser, turn_ends, thinking_ends, thinking, params, guide)


def text_sequence(
    loaded: LoadedModel, prompt: str | Sequence[int], thinking: bool, params: SamplingParams
) -> TokenSequence:
    """Prepare the continuation of a text or of token ids. Raises: RequestError."""
    ids = loaded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    grammar, guide = params.grammar, None
    if grammar is not None:
        if grammar.calls:
            raise RequestError("grammar: expected one for content with a prompt, got one for tool calls")
        guide = Guide(grammar, loaded.guide_vocabulary, thinking=False)
    return _sequence(loaded, ids, PlainText(loaded.tokenizer), [], [], thinking, params, guide)


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
            f"prompt: expected at most {context} tokens (the model's context), got {prompt_tokens}"
        )
    if prompt_tokens > cache:
        raise ContextLengthError(
            f"prompt: expected at most {cache} tokens (the size of the KV cache), got {prompt_tokens}",
            hint=_LARGER_CACHE,
        )


_LARGER_CACHE = "give kv_cache more tokens in the placement rules, e.g. kv_cache: {tokens: 131072}"


def _sequence(
    loaded: LoadedModel,
    ids: Sequence[int],
    parser: Parser,
    turn_ends: Sequence[int],
    thinking_ends: Sequence[int],
    thinking: bool,
    params: SamplingParams,
    guide: Guide | None,
) -> TokenSequence:
    vocab_size = loaded.config.vocab_size
    ids = check_ids(ids, vocab_size)
    params.check_vocabulary(vocab_size)
    params = params.over(SamplingParams.defaults(thinking, loaded.generation_config))
    return TokenSequence(
        ids,
        params,
        _max_tokens(params, len(ids), loaded),
        Sampler(params, vocab_size, ids),
        Output(parser, params.stop, params.include_stop),
        # K2.5 names [EOS] alone, and writes <|im_end|>
        {*loaded.config.eos_token_ids, *turn_ends, *(guide.end_ids if guide else ())},
        turn_ends,
        thinking_ends,
        loaded.block_tokens,
        None if params.logprobs is None else LogprobReader(loaded.tokenizer, params.logprobs),
        guide,
    )


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

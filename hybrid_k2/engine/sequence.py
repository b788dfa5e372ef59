"""One request on its way through the engine: its tokens, its pages of the cache, its sampler and its output."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from hybrid_k2.engine.guide import Guide
from hybrid_k2.engine.logprobs import LogprobReader
from hybrid_k2.engine.output import Output
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.reply import FinishReason, Timings, TokenLogprob, Usage
from hybrid_k2.engine.sampling import Sampler
from hybrid_k2.errors import RequestError
from hybrid_k2.model.batch import Chunk
from hybrid_k2.protocol import Event
from hybrid_k2.protocol.images import Image, image_of_token, is_image_token

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOGIT_TOKENS = 64  # of a prompt in a step whose logits are all wanted, or one block: 42 or 168 MB of them for K2.6


class TokenSequence:
    """Hold what one request needs between two steps.

    Tokens are those of the prompt, then those of the reply. The latents of the first `cached` of them lie in `pages`;
    the first `repeatable` of these are those of whole blocks of a prompt, so that computing them again gives the same
    bits. Blocks begin at multiples of `block_tokens`, however many of them a step computes. Where that is 1, a token
    has the same bits in any chunk: prompts are cut anywhere, and everything can be repeated. Without a seed they are
    cut anywhere, too: attention to one large chunk costs less than to the blocks in it.

    Some tokens of a prompt may be rows of `images`, which are named by their digests.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        max_tokens: int,
        sampler: Sampler,
        output: Output,
        end_ids: Collection[int],
        turn_end_ids: Collection[int],
        thinking_end_ids: Collection[int],
        block_tokens: int,
        logprobs: LogprobReader | None = None,
        guide: Guide | None = None,
        images: Mapping[int, Image] = MappingProxyType({}),
    ) -> None:
        """Start with nothing cached. Choices of one request share `prompt_ids`, which is copied when the reply begins.

        `turn_end_ids` are the end ids that the output's parser understands: with one, a call whose arguments are whole
        counts as complete. `thinking_end_ids` is empty for a reply that does not think.
        `logprobs` reads log probabilities where the request asks for them; `guide` says what its grammar allows.
        """
        self.tokens = prompt_ids
        self.prompt_tokens = len(self.tokens)
        self.params = params
        self.max_tokens = max_tokens
        self.sampler = sampler
        self.output = output
        self.block_tokens = block_tokens
        self.images = images
        self._image_places = image_places(prompt_ids) if images else []
        self.salt = ""  # which prefixes it may share: those of sequences with the same one
        self.pages: list[int] = []
        self.cached = 0
        self.repeatable = 0
        self.cached_at_start = 0
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.finish_reason: FinishReason | None = None
        self._matched_token: int | None = None
        self._end_ids = frozenset(() if params.ignore_eos else end_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._forbidden_ids = frozenset(params.forbidden_token_ids)
        self._silent_ids = frozenset(end_ids)
        self._turn_end_ids = frozenset(turn_end_ids)
        self._thinking_end_ids = frozenset(thinking_end_ids)
        self._thinking = bool(thinking_end_ids)
        self._reasoning_tokens = 0
        self._logprob_reader = logprobs
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []  # of the tokens from the second one on
        self._guide = guide

    @property
    def completion(self) -> list[int]:
        """Tokens of the reply so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def completion_tokens(self) -> int:
        """How many tokens the reply has."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Log probabilities of the reply's tokens so far; None if the request did not ask for them."""
        return tuple(self._logprobs) if self._logprob_reader is not None else None

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Log probabilities of the prompt's tokens from the second one on, so far; None if nobody asked for them."""
        return tuple(self._prompt_logprobs) if self.params.prompt_logprobs else None

    @property
    def reads_prompt(self) -> bool:
        """Whether all of the prompt must be computed, for log probabilities of it are missing."""
        return self.params.prompt_logprobs and len(self._prompt_logprobs) < self.prompt_tokens - 1

    def images_within(self, limit: int) -> list[int]:
        """List the images, by their digests, that have rows in `next_chunks` of this limit."""
        stop = self.cached + max(limit, self.next_tokens)
        return [digest for digest, first, last in self._image_places if first < stop and last > self.cached]

    def logprobs_after(self, count: int) -> tuple[TokenLogprob, ...]:
        """Log probabilities of the reply's tokens behind the first so many."""
        return tuple(self._logprobs[count:])

    @property
    def decoding(self) -> bool:
        """Whether the prompt is done and the next step is one token."""
        return self.completion_tokens > 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 while it decodes, more for a prompt."""
        return len(self.tokens) - self.cached

    @property
    def repeats(self) -> bool:
        """Whether the text must be the same, bit for bit, when the request comes again: it states its seed."""
        return self.params.seed is not None

    @property
    def repeats_until(self) -> int:
        """How many of its tokens may be blocks of another prompt; those of its reply were computed one by one."""
        block = self.block_tokens
        return len(self.tokens) if block == 1 else self.prompt_tokens // block * block

    @property
    def matched_stop(self) -> str | int | None:
        """The stop string or stop token that ended the reply."""
        return self._matched_token if self._matched_token is not None else self.output.matched_stop

    @property
    def next_tokens(self) -> int:
        """Tokens of the smallest next step."""
        return chunk_end(self.cached, self.prompt_tokens, self._cut_tokens) - self.cached

    def next_chunks(self, limit: int) -> list[Chunk]:
        """Return what the next step computes: blocks of the prompt, at least one, together at most `limit` tokens.

        Tokens of the reply are chunks of their own, as they were when they were sampled, so that a reply whose latents
        were given up goes on with the same bits. Where it may be cut anywhere, it is one chunk.
        """
        if self.reads_prompt:
            chunks = cut(
                self.tokens, self.cached, self.prompt_tokens, self._cut_tokens, min(limit, LOGIT_TOKENS), self.pages
            )
            return [replace(chunk, all_logits=True) for chunk in chunks]
        return cut(self.tokens, self.cached, self.prompt_tokens, self._cut_tokens, limit, self.pages)

    def read_prompt(self, chunks: Sequence[Chunk], rows: Tensor) -> None:
        """Read the log probabilities of the prompt's tokens that follow those of the chunks; known ones are left out.

        Shapes: rows: [tokens of the chunks, V].
        """
        assert self._logprob_reader is not None
        for place, row in enumerate(rows, start=chunks[0].cached + 1):
            if place == len(self._prompt_logprobs) + 1 < self.prompt_tokens:
                self._prompt_logprobs.append(self._logprob_reader.read(row, self.tokens[place]))

    def chunks_done(self, chunks: Sequence[Chunk]) -> None:
        """Count chunks whose latents are now in the cache."""
        for chunk in chunks:
            if self.repeatable == self.cached and self.block_tokens in (1, len(chunk.token_ids)):
                self.repeatable += len(chunk.token_ids)
            self.cached += len(chunk.token_ids)

    @property
    def _cut_tokens(self) -> int:
        return self.block_tokens if self.repeats else 1

    def sample(self, logits: Tensor) -> list[Event]:
        """Choose the next token and return the events that it leads to.

        Shapes: logits: [V].
        Raises: EngineError for logits that are not finite; RequestError for a grammar that takes more than it may. Both
        concern this sequence alone, which cannot go on.
        """
        token = self.sampler.sample(logits, self._allowed(len(logits)))
        if self._logprob_reader is not None:
            self._logprobs.append(self._logprob_reader.read(logits, token))
        if not self.decoding:
            self.tokens = [*self.tokens]
        self.tokens.append(token)
        if token in self._end_ids or token in self._stop_ids:
            if token in self._stop_ids:
                self._matched_token = token
            events = self.output.feed([token]) if token in self._turn_end_ids else []
            return events + self.finish("stop")
        if self._guide is not None:
            self._guide.advance(token)
        self._count_thinking(token)
        events = [] if token in self._silent_ids else self.output.feed([token])
        if self.output.matched_stop is not None:
            return events + self.finish("stop")
        if self.completion_tokens == self.max_tokens:
            return events + self.finish("length")
        return events

    def finish(self, reason: FinishReason) -> list[Event]:
        """End the reply and return the events that were held back. A second end changes nothing."""
        if self.finish_reason is not None:
            return []
        events = self.output.finish()
        called = reason == "stop" and self.matched_stop is None and self.output.tool_calls
        self.finish_reason = "tool_calls" if called else reason
        return events

    def usage(self) -> Usage:
        """Count tokens so far."""
        return Usage(self.prompt_tokens, self.cached_at_start, self.completion_tokens, self._reasoning_tokens)

    def timings(self) -> Timings:
        """Give the times so far, without the share of the memory's bandwidth, which the engine knows."""
        computed = self.prompt_tokens - self.cached_at_start
        prefill = computed / self.prefill_s if self.decoding and self.prefill_s > 0 else None
        decode = (self.completion_tokens - 1) / self.decode_s if self.completion_tokens > 1 and self.decode_s else None
        return Timings(self.prefill_s, self.decode_s, prefill, decode, None)

    def _allowed(self, vocab_size: int) -> NDArray[np.bool_] | None:
        """Say which tokens may come next. Shapes: [V]; None: all. Raises: RequestError if none may."""
        allowed = self._guide.allowed() if self._guide is not None else None
        if self._forbidden_ids:
            allowed = _without(allowed, self._forbidden_ids, vocab_size)
            if not allowed.any():
                raise RequestError("forbidden_token_ids: expected a token that may come, got all that fit forbidden")
        if self.completion_tokens < self.params.min_tokens:
            longer = _without(allowed, self._end_ids | self._stop_ids, vocab_size)
            return longer if longer.any() else allowed  # where the grammar is at its end, so is the reply
        return allowed

    def _count_thinking(self, token: int) -> None:
        if token in self._thinking_end_ids:
            self._thinking = False
        self._reasoning_tokens += self._thinking


def _without(allowed: NDArray[np.bool_] | None, ids: Collection[int], vocab_size: int) -> NDArray[np.bool_]:
    """Return a copy of a mask without some tokens. Shapes: [V]; None: all."""
    mask = np.ones(vocab_size, np.bool_) if allowed is None else allowed.copy()
    mask[[*ids]] = False
    return mask


def image_places(tokens: Sequence[int]) -> list[tuple[int, int, int]]:
    """Find the images among tokens: digest, first token, and the one behind the last."""
    found: list[tuple[int, int, int]] = []
    for place, token in enumerate(tokens):
        if is_image_token(token):
            digest, row = image_of_token(token)
            first = place if row == 0 else found.pop()[1]
            found.append((digest, first, place + 1))
    return found


def cut(
    tokens: Sequence[int], start: int, prompt_tokens: int, block_tokens: int, limit: int, pages: Sequence[int]
) -> list[Chunk]:
    """Cut tokens from `start` on into chunks, at least one, together at most `limit` tokens.

    The first `prompt_tokens` are cut into blocks, the others one by one; blocks of one token are one chunk together.
    """
    if block_tokens == 1:
        stop = min(len(tokens), start + max(1, limit))
        return [Chunk(tokens[start:stop], start, pages, logits=stop == len(tokens))]
    chunks: list[Chunk] = []
    first = start
    while start < len(tokens):
        stop = chunk_end(start, prompt_tokens, block_tokens)
        if chunks and stop - first > limit:
            break
        chunks.append(Chunk(tokens[start:stop], start, pages, logits=stop == len(tokens), follows=bool(chunks)))
        start = stop
    return chunks


def chunk_end(start: int, prompt_tokens: int, block_tokens: int) -> int:
    """Return where the smallest chunk that begins at `start` ends."""
    if start >= prompt_tokens:
        return start + 1
    return min(prompt_tokens, (start // block_tokens + 1) * block_tokens)

"""Run sequences through the model: a step of many of them, and the loop that serves one request."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor

from hybrid_k2.engine.prefix import PrefixCache
from hybrid_k2.engine.reply import FinishEvent, Reply
from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.engine.sight import Sight
from hybrid_k2.errors import EngineError
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.text import TextModel
from hybrid_k2.protocol import Event

Work = tuple[TokenSequence, Sequence[Chunk]]  # what a step computes of a sequence
OnPrefill = Callable[[int, int], None]  # prompt tokens done (the cached ones included), prompt tokens


@dataclass
class Runner:
    """Hold what every generation of one engine works with; one at a time may enter."""

    model: TextModel
    cache: LatentCache
    prefix: PrefixCache
    sight: Sight
    chunk_tokens: int  # prompt tokens of a step
    enter: Callable[[], AbstractContextManager[None]]
    memory_share: Callable[[float], float | None]  # of a decoding speed
    after_step: Callable[[], None]  # is called when a step has been computed

    def forward(self, work: Sequence[Work]) -> list[Tensor | None]:
        """Compute chunks of several sequences, prompts and decode steps mixed; return the logits to sample from.

        The latents are in the cache afterwards, and `chunks_done` may be called. If the step fails, no sequence has
        changed but for pages that it now owns.
        Shapes: [vocab] fp32 on the host for each, None in the middle of a prompt.
        Raises: EngineError when the cache has no room or the model fails.
        """
        features = self.sight.features(work)
        for sequence, chunks in work:
            missing = self.cache.pages_for(chunks[-1].cached + len(chunks[-1].token_ids)) - len(sequence.pages)
            sequence.pages.extend(self.prefix.allocate(max(0, missing)))
        batch = Batch.build([chunk for _, chunks in work for chunk in chunks], features=features)
        logits = self.model.forward(batch, self.cache).cpu()  # the rows of all at once
        self.after_step()
        parts = torch.split(logits, [sum(chunk.logit_rows for chunk in chunks) for _, chunks in work])
        for (sequence, chunks), rows in zip(work, parts, strict=True):
            if sequence.reads_prompt:
                sequence.read_prompt(chunks, rows)
        return [rows[-1] if chunks[-1].logits else None for (_, chunks), rows in zip(work, parts, strict=True)]

    def reply(self, sequence: TokenSequence, *, alone: bool = True) -> Reply:
        """Put together the reply of a sequence; an unfinished one counts as cancelled.

        alone: nothing else was computed in its steps, so that its speed says how fast weights were read.
        """
        timings = sequence.timings()
        if alone and timings.decode_tokens_per_s is not None:
            timings = replace(timings, memory_share=self.memory_share(timings.decode_tokens_per_s))
        return Reply(
            content=sequence.output.content,
            reasoning=sequence.output.reasoning,
            tool_calls=sequence.output.tool_calls,
            finish_reason=sequence.finish_reason or "cancelled",
            matched_stop=sequence.matched_stop,
            seed=sequence.sampler.seed,
            usage=sequence.usage(),
            timings=timings,
            token_ids=tuple(sequence.completion),
            logprobs=sequence.logprobs,
            prompt_logprobs=sequence.prompt_logprobs,
        )


class Generation(Iterator[Event]):
    """Iterate over the events of one reply; the last is a `FinishEvent`.

    Nothing is computed before the first event is asked for. Leaving the loop early, `close`, an exception and
    Ctrl-C all free what the request holds; the engine can serve the next one at once. One thread at a time may iterate;
    `cancel` may be called from any.
    """

    def __init__(self, runner: Runner, sequence: TokenSequence, on_prefill: OnPrefill | None) -> None:
        self._runner = runner
        self._sequence = sequence
        self._cancelled = threading.Event()
        # A plain function, not a method: a cycle through self would delay the release when the reader drops this.
        self._events = _events(runner, sequence, self._cancelled, on_prefill)

    def __next__(self) -> Event:
        return next(self._events)

    def cancel(self) -> None:
        """End the reply before the next step; what is held back and a FinishEvent ("cancelled") still come."""
        self._cancelled.set()

    def close(self) -> None:
        """End the reply now, without further events. Raises: EngineError while another thread computes."""
        if inspect.getgeneratorstate(self._events) == inspect.GEN_RUNNING:
            raise EngineError(
                "generation: expected it to wait for its reader, got one that is computing",
                hint="cancel() it and read its events to the end",
            )
        self._events.close()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._sequence.prompt_tokens

    @property
    def reply(self) -> Reply:
        """The reply so far; its finish reason is "cancelled" unless it came to its end."""
        return self._runner.reply(self._sequence)


def _events(
    runner: Runner, sequence: TokenSequence, cancelled: threading.Event, on_prefill: OnPrefill | None
) -> Generator[Event, None, None]:
    with runner.enter():
        runner.prefix.lend(sequence)
        sequence.cached_at_start = sequence.cached
        try:
            if on_prefill:
                on_prefill(sequence.cached, sequence.prompt_tokens)
            while sequence.finish_reason is None:
                if cancelled.is_set():
                    yield from sequence.finish("cancelled")
                    break
                if not runner.sight.sees(sequence, runner.chunk_tokens):
                    _look(runner, sequence)
                    continue
                decoding = sequence.decoding
                events = _timed_step(runner, sequence)
                if on_prefill and not decoding:
                    on_prefill(sequence.cached, sequence.prompt_tokens)
                yield from events
            yield FinishEvent(reply=runner.reply(sequence))
        finally:
            sequence.finish("cancelled")
            runner.prefix.keep(sequence)


def _look(runner: Runner, sequence: TokenSequence) -> None:
    """Encode a piece of an image that the next step needs."""
    start = time.perf_counter()
    runner.sight.look(sequence, (), runner.chunk_tokens, seconds=0)
    sequence.prefill_s += time.perf_counter() - start


def _timed_step(runner: Runner, sequence: TokenSequence) -> list[Event]:
    decoding, start = sequence.decoding, time.perf_counter()
    chunks = sequence.next_chunks(runner.chunk_tokens)
    (logits,) = runner.forward([(sequence, chunks)])
    sequence.chunks_done(chunks)
    events = [] if logits is None else sequence.sample(logits)
    elapsed = time.perf_counter() - start
    if decoding:
        sequence.decode_s += elapsed
    else:
        sequence.prefill_s += elapsed
    return events

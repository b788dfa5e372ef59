"""Serve many requests of one engine: a thread that runs steps of many sequences, and the way in and out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType
from typing import Any

from torch import Tensor

from hybrid_k2.engine.engine import Engine
from hybrid_k2.engine.fingerprint import fingerprint
from hybrid_k2.engine.generation import Work
from hybrid_k2.engine.prefix_file import restore_prefixes, save_prefixes
from hybrid_k2.engine.sampling import NotFiniteError
from hybrid_k2.engine.scheduler import Job, Scheduler
from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.engine.service_types import (
    Failed,
    Finished,
    Piece,
    Progress,
    QueueFullError,
    ServiceClosingError,
    ServiceEvent,
    ServiceOptions,
    ServiceRequest,
    ServiceStats,
)
from hybrid_k2.errors import EngineError, HybridK2Error
from hybrid_k2.model.batch import Chunk
from hybrid_k2.protocol import Event

log = logging.getLogger("hybrid_k2")

OnEvent = Callable[[ServiceEvent], None]
_RETRY_S = (1.0, 60.0)  # the least and the most that a client is told to wait
_LOOK_S = 0.05  # at a time, where an image is all there is to do
_HOPELESS = 2  # so many requests that fail one after the other, and none that does not
_NEW_SHARE = 0.1  # of the latest request in the running average of how long one takes


class Ticket:
    """One accepted request; its events come through the callback that `Service.submit` got."""

    def __init__(self, number: int, jobs: Sequence[Job], on_event: OnEvent) -> None:
        self.id = f"{number:08x}"
        self.prompt_tokens = jobs[0].sequence.prompt_tokens
        self.cancelled = False
        self.held = list(jobs[1:])  # until the first has computed the prompt, whose pages they share
        self.submitted_at = time.monotonic()
        self._on_event = on_event

    def cancel(self) -> None:
        """End the request before the next step, wherever it is; a Finished event ("cancelled") follows for each choice.

        Any thread, any time, and at once: the service's thread looks before each step, and works while there is a
        request. One that has ended is not changed.
        """
        self.cancelled = True

    def send(self, event: ServiceEvent) -> None:
        """Hand an event on. A reader that fails ends its own request and no other."""
        try:
            self._on_event(event)
        except Exception:
            log.exception("request %s: its reader failed, which cancels it", self.id)
            self._on_event = lambda event: None
            self.cancelled = True


@dataclass
class _Result:
    """What a step brought for one job: its events, or the error that ends its request."""

    events: list[Event]
    sampled: bool
    error: HybridK2Error | None = None
    engine_failed: bool = False  # the error is not of the request's making


class Service:
    """Serve many requests of one engine at once. Any thread may call; close it or use it in a `with` statement.

    While it is open it has the engine to itself: `Engine.generate` is refused.
    """

    def __init__(self, engine: Engine, options: ServiceOptions | None = None) -> None:
        """Read the prefix cache's file, if there is one, and start the thread.

        Raises: ConfigError for options that do not fit the engine; RequestError if the engine is busy, EngineError if
        it is closed.
        """
        self._engine = engine
        self._options = options = options or ServiceOptions()
        options.check(engine.plan)
        self._runner = engine.runner
        self._scheduler = Scheduler(
            self._runner.cache,
            self._runner.prefix,
            self._runner.sight,
            step_tokens=options.step_tokens or engine.plan.chunk_tokens,
            most_tokens=engine.plan.batch_tokens,
            max_running=options.max_running,
            max_running_per_key=options.max_running_per_key or options.max_running,
        )
        # Scheduler, prefix cache and sequences are the thread's alone; `_changed` guards what others see and change.
        self._changed = threading.Condition()
        self._tickets: dict[Job, Ticket] = {}  # of the jobs that have not ended
        self._arrived: list[Job] = []  # which the thread has not seen
        self._numbers = count(1)
        self._draining = self._closing = self._closed = False
        self._close = threading.Lock()  # one thread closes, the others wait for it
        self._broken: EngineError | None = None
        self._request_s = _RETRY_S[0]  # how long a request takes, from its submission
        self._stats = ServiceStats(started_at=time.time(), kv_pages_total=self._runner.cache.pool.pages)
        with ExitStack() as stack:
            stack.enter_context(self._runner.enter())
            self._runner.prefix.set_ram(options.cache_ram_bytes)
            if options.cache_path is not None:
                restore_prefixes(self._runner.prefix, options.cache_path, fingerprint(engine.loaded))
            self._entered = stack.pop_all()
        self._thread = threading.Thread(target=self._run, name="hybrid-k2 service", daemon=True)
        self._thread.start()

    def submit(self, request: ServiceRequest, on_event: OnEvent) -> Ticket:
        """Take a request on.

        Its events reach `on_event` in order, on the service's thread, which it must not keep. The last of each choice
        is a Finished; or one Failed ends the whole request.
        Raises: RequestError for a request that is wrong; QueueFullError; ServiceClosingError; EngineError if the
        service cannot go on.
        """
        with self._changed:
            self._check_places(request.key)  # before a long prompt is encoded for nothing
        jobs = self._jobs(request)
        with self._changed:
            self._check_places(request.key)
            ticket = Ticket(next(self._numbers), jobs, on_event)
            self._tickets.update(dict.fromkeys(jobs, ticket))
            self._arrived.append(jobs[0])
            self._count(requests=1)
            self._changed.notify_all()
        return ticket

    def stats(self) -> ServiceStats:
        """Return what the service does and did; it does not wait for a step, and pages may be those of a moment ago."""
        scheduler, prefix = self._scheduler, self._runner.prefix
        running = [*scheduler.running]
        with self._changed:
            return replace(
                self._stats,
                healthy=self._stats.healthy and self._broken is None,
                running=len(running),
                waiting=self._waiting(),
                kv_pages_used=len(set().union(*[job.sequence.pages for job in running])),
                kv_pages_kept=prefix.kept_pages,
                ram_pages_kept=prefix.stored_pages,
                preemptions=scheduler.preemptions,
            )

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those that are there; say whether all have ended."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._tickets, timeout_s)

    def close(self) -> None:
        """Cancel what is left, save the prefix cache if that is asked for, and let go of the engine. Twice is fine.

        Raises: EngineError in a callback of `submit`: the thread that runs it cannot wait for its own end.
        """
        if threading.current_thread() is self._thread:
            raise EngineError("service: expected another thread to close it, got its own")
        with self._changed:
            self._draining = self._closing = True
            for ticket in self._tickets.values():
                ticket.cancelled = True
            self._changed.notify_all()
        self._thread.join()
        with self._close:
            if self._closed:
                return
            self._closed = True
            with self._entered:  # nobody enters the engine meanwhile
                if self._options.cache_path is not None and self._broken is None:
                    save_prefixes(self._runner.prefix, self._options.cache_path, fingerprint(self._engine.loaded))
                self._runner.prefix.set_ram(0)
                self._runner.sight.forget()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The callers' side

    def _jobs(self, request: ServiceRequest) -> list[Job]:
        sequences = self._engine.sequences(
            request.prompt,
            messages=request.messages,
            tools=request.tools,
            thinking=request.thinking,
            preserve_thinking=request.preserve_thinking,
            params=request.params,
            n=request.n,
        )
        for sequence in sequences:
            sequence.salt = request.cache_salt
        return [Job(sequence, request.key, choice) for choice, sequence in enumerate(sequences)]

    def _check_open(self) -> None:
        if self._broken is not None:
            raise EngineError(f"service: it cannot go on: {self._broken.message}", hint="start it again")
        if self._draining:
            raise ServiceClosingError("service: expected one that takes requests, got one that is shutting down")

    def _check_places(self, key: str) -> None:
        self._check_open()
        options, running = self._options, [job for job in self._tickets if job.began]
        free = options.max_running - len(running)
        self._check_place("queue", self._waiting(), options.max_waiting, free)
        if options.max_waiting_per_key is not None:
            of_key = (options.max_running_per_key or options.max_running) - sum(job.key == key for job in running)
            self._check_place("key", self._waiting(key), options.max_waiting_per_key, min(free, of_key))

    def _check_place(self, reason: str, waiting: int, most: int, free: int) -> None:
        if waiting < most + max(0, free):  # some of them are about to begin
            return
        self._count(rejected=1)
        wait_s = self._request_s * (waiting + 1) / self._options.max_running
        raise QueueFullError(
            f"queue: expected at most {most} waiting requests{' of one key' if reason == 'key' else ''}, got one more",
            retry_after_s=min(max(wait_s, _RETRY_S[0]), _RETRY_S[1]),
            reason=reason,
            hint="try again later",
        )

    def _waiting(self, key: str | None = None) -> int:
        """Count the requests that have not begun."""
        first = (job for job in self._tickets if job.choice == 0 and not job.began)
        return sum(key in (None, job.key) for job in first)

    def _count(self, **more: int) -> None:
        with self._changed:
            sums: dict[str, Any] = {name: getattr(self._stats, name) + value for name, value in more.items()}
            self._stats = replace(self._stats, **sums)

    # The thread's side

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as error:
            log.exception("the service cannot go on")
            self._give_up(EngineError(f"an unexpected error, {type(error).__name__}: {error}"))

    def _give_up(self, error: EngineError) -> None:
        """Tell everyone; what the scheduler thinks is not to be relied on any more."""
        with self._changed:
            self._broken = error
            jobs, tickets = [*self._tickets], {*self._tickets.values()}
            self._tickets.clear()
            self._changed.notify_all()
        for ticket in tickets:
            ticket.send(Failed(error))
        for job in jobs:
            self._runner.prefix.take_back(job.sequence)

    def _wait_for_work(self) -> bool:
        """Queue what has arrived and end what is cancelled; False when there is nothing left and nothing will come."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._tickets) or self._closing)
            for job in self._arrived:
                self._scheduler.queue.add(job)
            self._arrived.clear()
            if not self._tickets:
                return False
            cancelled = [job for job, ticket in self._tickets.items() if ticket.cancelled]
        for job in cancelled:
            self._cancel(job)
        return True

    def _cancel(self, job: Job) -> None:
        if job not in self._tickets:  # another choice of its request has failed
            return
        try:
            events = job.sequence.finish("cancelled")
        except Exception as error:  # of a parser
            self._fail(job, _as_error(error))
        else:
            self._end(job, events)

    def _step(self) -> None:
        begun, work = self._scheduler.next_step()
        for job in begun:
            self._begin(job)
        start = time.perf_counter()
        if work:
            self._compute_step(work)
        lacking = self._scheduler.lacking()
        if lacking is not None:
            # Beside others for as long as they were computed; alone until it is time to look who was cancelled.
            self._look(lacking, time.perf_counter() - start if work else _LOOK_S)

    def _look(self, job: Job, seconds: float) -> None:
        """Encode an image that a prompt cannot go on without."""
        start = time.perf_counter()
        try:
            self._scheduler.look(job, seconds)
        except Exception as error:
            self._fail(job, _as_error(error))
        job.sequence.prefill_s += time.perf_counter() - start

    def _compute_step(self, work: dict[Job, Work]) -> None:
        prompts = {job: sum(len(chunk.token_ids) for chunk in work[job][1]) for job in work if not job.prompt_done}
        start = time.perf_counter()
        results = self._compute(work)
        elapsed = time.perf_counter() - start
        self._count(
            steps=1,
            prompt_tokens=sum(prompts.values()),
            generated_tokens=sum(result.sampled for result in results.values()),
        )
        with self._changed:
            self._stats = replace(
                self._stats,
                step_s=elapsed,
                step_prompt_tokens=sum(prompts.values()),
                step_sequences=len(work),
                healthy=not all(result.engine_failed for result in results.values()),
            )
        for job, result in results.items():
            if job in prompts:
                job.sequence.prefill_s += elapsed
            else:
                job.sequence.decode_s += elapsed
            self._settle(job, result)

    def _begin(self, job: Job) -> None:
        if job.began:
            return
        sequence = job.sequence
        sequence.cached_at_start = sequence.cached
        with self._changed:
            job.began = True
            self._count(prefix_queries_tokens=sequence.prompt_tokens, prefix_hit_tokens=sequence.cached)
        if job.choice == 0:
            self._tickets[job].send(Progress(sequence.cached, sequence.prompt_tokens, sequence.cached))

    def _compute(self, work: dict[Job, Work]) -> dict[Job, _Result]:
        logits, errors = self._forward(work)
        results = {job: _Result([], False, error, engine_failed=True) for job, error in errors.items()}
        for job, row in logits.items():
            results[job] = self._sample(*work[job], row)
        return results

    def _forward(self, work: dict[Job, Work]) -> tuple[dict[Job, Tensor | None], dict[Job, HybridK2Error]]:
        """Run a step. If it fails, run each job alone: the request that fails then is the one to blame."""
        try:
            return dict(zip(work, self._runner.forward([*work.values()]), strict=True)), {}
        except Exception as error:
            log.warning("a step of %d sequences failed: %s", len(work), error)
            self._count(failed_steps=1)
            if len(work) == 1:
                return {}, dict.fromkeys(work, _as_error(error))
        logits: dict[Job, Tensor | None] = {}
        errors: dict[Job, HybridK2Error] = {}
        for job, item in work.items():
            if len(errors) >= _HOPELESS and not logits:  # it is not the requests: do not wait for each in turn
                errors[job] = next(iter(errors.values()))
                continue
            try:
                (logits[job],) = self._runner.forward([item])
            except Exception as error:
                errors[job] = _as_error(error)
        return logits, errors

    def _sample(self, sequence: TokenSequence, chunks: Sequence[Chunk], logits: Tensor | None) -> _Result:
        sequence.chunks_done(chunks)
        if logits is None:
            return _Result([], False)
        try:
            return _Result(sequence.sample(logits), True)
        except Exception as error:
            damaged = isinstance(error, NotFiniteError)
            if damaged:
                self._runner.prefix.release()  # latents may be, too
            return _Result([], False, _as_error(error), engine_failed=damaged)

    def _settle(self, job: Job, result: _Result) -> None:
        """Send what a step brought, and end what has come to its end."""
        if job not in self._tickets:  # another choice of its request has failed
            return
        ticket, sequence = self._tickets[job], job.sequence
        if result.error is not None:
            self._fail(job, result.error)
            return
        if not job.prompt_done:
            if job.choice == 0:
                done = min(sequence.cached, sequence.prompt_tokens)
                ticket.send(Progress(done, sequence.prompt_tokens, sequence.cached_at_start))
            if result.sampled:
                self._prompt_done(job, ticket)
        if sequence.finish_reason is not None:
            self._end(job, result.events)
        else:
            self._send(job, ticket, result.events)

    def _prompt_done(self, job: Job, ticket: Ticket) -> None:
        """Let others use the latents of the prompt, the other choices first of all."""
        job.prompt_done = True
        self._runner.prefix.publish(job.sequence)
        while ticket.held:
            self._scheduler.queue.put_back(ticket.held.pop())

    def _send(self, job: Job, ticket: Ticket, events: Iterable[Event]) -> None:
        for event in events:
            logprobs = job.sequence.logprobs_after(job.logprobs_sent)
            ticket.send(Piece(job.choice, event, logprobs))
            job.logprobs_sent += len(logprobs)

    def _end(self, job: Job, events: Iterable[Event]) -> None:
        ticket, reply = self._tickets[job], self._runner.reply(job.sequence, alone=False)
        self._runner.prefix.keep(job.sequence)
        with self._changed:
            self._remove(job, ticket)
            self._request_s += _NEW_SHARE * (time.monotonic() - ticket.submitted_at - self._request_s)
            self._count(finished=1, cancelled=int(reply.finish_reason == "cancelled"))
        self._send(job, ticket, events)
        ticket.send(Finished(job.choice, reply))

    def _fail(self, job: Job, error: HybridK2Error) -> None:
        """End a request: all its choices."""
        ticket = self._tickets[job]
        with self._changed:
            for other in [other for other, its in self._tickets.items() if its is ticket]:
                self._runner.prefix.take_back(other.sequence)
                self._remove(other, ticket)
            self._count(failed=1)
        ticket.send(Failed(error))

    def _remove(self, job: Job, ticket: Ticket) -> None:
        if job in ticket.held:
            ticket.held.remove(job)
        else:
            self._scheduler.end(job)
        del self._tickets[job]
        self._changed.notify_all()


def _as_error(error: Exception) -> HybridK2Error:
    """Return what a caller may be told: an error of ours as it is, another one as what it is to him."""
    if isinstance(error, HybridK2Error):
        return error
    log.error("an unexpected error in a step", exc_info=error)
    return EngineError(f"step: an unexpected error, {type(error).__name__}: {error}")

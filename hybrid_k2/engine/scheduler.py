"""Decide what each step computes: who begins, who goes on, who gives up pages.

A step has a budget of tokens. Sequences that decode come first, with one token each; the rest is for prompts, in whole
blocks, and they take turns. So a step never computes more than the budget (or one block, where that is more), however
long a prompt is, and every prompt moves on.

Pages are taken as a sequence needs them. When there are none left, the sequence that began last gives up its own: it
waits at the head of its queue and computes them again later, cut into the same chunks as before, which gives the same
bits. The one that began first is never the victim while another runs, so the oldest always ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_k2.engine.fair_queue import FairQueue
from hybrid_k2.engine.generation import Work
from hybrid_k2.engine.prefix import PrefixCache
from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.model.latent_cache import LatentCache


@dataclass(eq=False)
class Job:
    """One choice of a request on its way: its sequence, and whose it is."""

    sequence: TokenSequence
    key: str
    choice: int = 0
    began: bool = False
    prompt_done: bool = False
    last_step: int = 0  # that computed a part of its prompt
    logprobs_sent: int = 0

    def needs(self, cache: LatentCache) -> int:
        """Count the pages that it lacks for all its tokens and the next one."""
        return max(0, cache.pages_for(len(self.sequence.tokens) + 1) - len(self.sequence.pages))


class Scheduler:
    """Own the queue and the running jobs. It computes nothing, and one thread at a time may use it."""

    def __init__(
        self, cache: LatentCache, prefix: PrefixCache, *, step_tokens: int, max_running: int, max_running_per_key: int
    ) -> None:
        self.queue = FairQueue[Job]()
        self.running: list[Job] = []  # in the order in which they began
        self.preemptions = 0
        self._cache = cache
        self._prefix = prefix
        self._step_tokens = step_tokens
        self._max_running = max_running
        self._max_running_per_key = max_running_per_key
        self._step = 0

    def next_step(self) -> tuple[list[Job], dict[Job, Work]]:
        """Return the jobs that begin, and what to compute of which jobs; their pages are there."""
        begun = self._admit()
        self._step += 1
        work: dict[Job, Work] = {}
        budget = self._step_tokens
        for job in [job for job in self.running if job.sequence.remaining == 1]:
            budget -= self._take(job, 1, work)
        prompts = [job for job in self.running if job.sequence.remaining > 1]
        computed = 0
        for job in sorted(prompts, key=lambda job: job.last_step):
            if computed == 0 or job.sequence.next_tokens <= budget:
                taken = self._take(job, budget, work)
                computed += taken
                budget -= taken
                job.last_step = self._step
        for job, (_, chunks) in work.items():
            self.queue.charge(job.key, sum(len(chunk.token_ids) for chunk in chunks))
        return begun, work

    def end(self, job: Job) -> None:
        """Take a job out of the running ones or of the queue; its pages are the caller's business."""
        if job in self.running:
            self.running.remove(job)
        else:
            self.queue.remove(job)
        if not any(other.key == job.key for other in self.running):
            self.queue.gone(job.key)

    def _admit(self) -> list[Job]:
        begun = []
        while len(self.running) < self._max_running:
            job = self.queue.first(self._may_run)
            if job is None:
                break
            promised = sum(other.needs(self._cache) for other in self.running)
            needed = job.needs(self._cache) - self._prefix.in_use(job.sequence)
            if self.running and not self._prefix.has_room(needed + promised):
                break  # nobody passes it, or a long prompt would wait for ever
            self._prefix.lend(job.sequence)
            self.queue.remove(job)
            self.running.append(job)
            begun.append(job)
        return begun

    def _may_run(self, key: str) -> bool:
        return sum(job.key == key for job in self.running) < self._max_running_per_key

    def _take(self, job: Job, limit: int, work: dict[Job, Work]) -> int:
        """Add a job's next chunks to a step and return their tokens; 0 if it has to give up its pages."""
        if job not in self.running:  # it was a victim a moment ago
            return 0
        chunks = job.sequence.next_chunks(limit)
        stop = chunks[-1].cached + len(chunks[-1].token_ids)
        missing = max(0, self._cache.pages_for(stop) - len(job.sequence.pages))
        while not self._prefix.has_room(missing):
            victim = self.running[-1]
            self._preempt(victim)
            work.pop(victim, None)
            if victim is job:
                return 0
        job.sequence.pages.extend(self._prefix.allocate(missing))
        work[job] = (job.sequence, chunks)
        return stop - job.sequence.cached

    def _preempt(self, job: Job) -> None:
        self.preemptions += 1
        self._prefix.keep(job.sequence)
        self.running.remove(job)
        self.queue.put_back(job)

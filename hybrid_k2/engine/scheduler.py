"""Decide what each step computes: who begins, who goes on, who gives up pages.

A step has a budget of tokens. Sequences that decode come first, with one token each; the rest is for prompts, in whole
blocks, and they take turns. So a step never computes more than the budget (or the decoding sequences and one portion of
a prompt, where that is more), however long a prompt is, and every prompt moves on. No step has more tokens than the
model takes; where more sequences decode, they take turns, too.

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
from hybrid_k2.engine.sight import Sight
from hybrid_k2.model.latent_cache import LatentCache

PORTION = 256  # tokens of a prompt that a step computes, or half of its budget, also where many sequences decode


@dataclass(eq=False)
class Job:
    """One choice of a request on its way: its sequence, and whose it is."""

    sequence: TokenSequence
    key: str
    choice: int = 0
    began: bool = False
    prompt_done: bool = False
    charged: int = 0  # its first tokens, which its key has paid for
    turn: tuple[int, int] = (0, 0)  # the last step that computed something of it, and its place there
    logprobs_sent: int = 0

    def needs(self, cache: LatentCache) -> int:
        """Count the pages that it lacks for all its tokens and the next one."""
        return max(0, cache.pages_for(len(self.sequence.tokens) + 1) - len(self.sequence.pages))


class Scheduler:
    """Own the queue and the running jobs. It computes nothing, and one thread at a time may use it.

    step_tokens: the budget. most_tokens: what the model takes in one step, at least twice a block. max_running:
    sequences at once, per_key: of one key.
    """

    def __init__(
        self,
        cache: LatentCache,
        prefix: PrefixCache,
        sight: Sight,
        *,
        step_tokens: int,
        most_tokens: int,
        max_running: int,
        max_running_per_key: int,
    ) -> None:
        self.queue = FairQueue[Job]()
        self.running: list[Job] = []  # in the order in which they began
        self.preemptions = 0
        self._cache = cache
        self._prefix = prefix
        self._sight = sight
        self._step_tokens = step_tokens
        self._most_tokens = most_tokens
        self._portion = max(1, min(PORTION, step_tokens // 2))
        self._max_running = max_running
        self._max_running_per_key = max_running_per_key
        self._step = 0
        self._refused: tuple[Job, int] | None = None  # for want of pages, and when: to look again costs a long prompt

    def next_step(self) -> tuple[list[Job], dict[Job, Work]]:
        """Return the jobs that begin, and what to compute of which jobs; their pages are there.

        Prompts that lack an image are left out.
        """
        begun = self._admit()
        self._step += 1
        work: dict[Job, Work] = {}
        decoding = [job for job in self._in_turn() if job.sequence.remaining == 1]
        prompts = [job for job in self._prompts() if self._sight.sees(job.sequence, self._step_tokens)]
        reserved = max(self._portion, prompts[0].sequence.next_tokens) if prompts else 0
        for job in decoding[: max(1, self._most_tokens - reserved)]:
            self._take(job, 1, work)
        budget = self._step_tokens - len(work)
        taken, reads = 0, False
        for job in prompts:
            if job.sequence.reads_prompt:
                if reads:
                    continue  # one at a time: its logits take memory, and reading them keeps the others waiting
                reads = True
            limit = budget - taken if taken else max(budget, self._portion)
            if not taken or job.sequence.next_tokens <= limit:
                taken += self._take(job, limit, work)
        for place, (job, (_, chunks)) in enumerate(work.items()):
            job.turn = self._step, place
            stop = chunks[-1].cached + len(chunks[-1].token_ids)
            # Not again for what it computes again: that it gave up its pages was for others.
            self.queue.charge(job.key, max(0, stop - max(job.charged, chunks[0].cached)))
            job.charged = max(job.charged, stop)
        return begun, work

    def lacking(self) -> Job | None:
        """Return the job whose turn it is to have an image encoded."""
        return next((job for job in self._prompts() if not self._sight.sees(job.sequence, self._step_tokens)), None)

    def look(self, job: Job, seconds: float) -> None:
        """Encode for so many seconds, or one piece, what a job is `lacking`, if there is room for it now.

        Raises: EngineError, MemoryBudgetError, which concern this job alone.
        """
        beside = [other.sequence for other in self.running if other is not job]
        self._sight.look(job.sequence, beside, self._step_tokens, seconds)

    def _in_turn(self) -> list[Job]:
        return sorted(self.running, key=lambda job: job.turn)

    def _prompts(self) -> list[Job]:
        return [job for job in self._in_turn() if job.sequence.remaining > 1]

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
            if job is None or not self._has_room(job):
                break  # nobody passes one that lacks pages, or a long prompt would wait for ever
            self._prefix.lend(job.sequence)
            self.queue.remove(job)
            self.running.append(job)
            # Before those that the last step computed, behind those that it did not: new ones keep nobody waiting.
            job.turn = self._step - 1, self._max_running
            begun.append(job)
        return begun

    def _has_room(self, job: Job) -> bool:
        """Say whether there are pages for a job beside what the others still lack. Alone it always has room."""
        if not self.running:
            return True
        if self._refused == (job, self._prefix.changes):
            return False
        promised = sum(other.needs(self._cache) for other in self.running)
        needed = job.needs(self._cache) - self._prefix.in_use(job.sequence)
        room = self._prefix.has_room(needed + promised)
        self._refused = None if room else (job, self._prefix.changes)
        return room

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

"""The scheduler without a model: random schedules against what must always hold, and who comes when."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, cast

import pytest

from hybrid_k2.config import ModelConfig
from hybrid_k2.engine.generation import Work
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.prefix import PrefixCache
from hybrid_k2.engine.scheduler import Job, Scheduler
from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.engine.sight import Sight
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.placement.plan import KvCachePlan
from tests.generators import config_dict

CONFIG = ModelConfig.from_dict(config_dict(num_hidden_layers=1), "test")
PAGE = 4


def make_job(tokens: list[int], reply: int, *, key: str = "", seed: int | None = None, block: int = 1) -> Job:
    """Make a job without sampler and parser: the tests choose its tokens."""
    nothing = cast(Any, None)
    return Job(TokenSequence([*tokens], SamplingParams(seed=seed), reply, nothing, nothing, (), (), (), block), key)


class Machine:
    """A scheduler over a cache, and what the service does around it, with tokens that depend on the place alone."""

    def __init__(self, pages: int, *, ram_pages: int = 0, most_tokens: int = 16, **options: Any) -> None:
        self.cache = LatentCache(KvCachePlan("host", "fp32", pages * PAGE, PAGE, 0), CONFIG)
        self.prefix = PrefixCache(self.cache, ram_pages * self.cache.page_like().nbytes)
        self.step_tokens = options.setdefault("step_tokens", most_tokens)
        self.most_tokens = most_tokens
        options = {"max_running": 4, "max_running_per_key": 4} | options
        self.options = options
        self.scheduler = Scheduler(self.cache, self.prefix, Sight(None), most_tokens=most_tokens, **options)
        self.jobs: list[Job] = []  # that have not ended
        self.order: list[Job] = []  # in which they began
        self.ended: list[Job] = []

    def add(self, job: Job) -> Job:
        self.jobs.append(job)
        self.scheduler.queue.add(job)
        return job

    def step(self) -> dict[Job, Work]:
        """Run a step that works."""
        work = self.plan()
        for job in work:
            self.compute(job, work)
        return work

    def plan(self) -> dict[Job, Work]:
        preemptions = self.scheduler.preemptions
        begun, work = self.scheduler.next_step()
        # Where blocks have bits of their own, one may hold copies of pages that the tree has, and begin again alone.
        again = any(job.sequence.block_tokens > 1 for job in self.jobs) and self.scheduler.preemptions > preemptions
        assert bool(work) == bool(self.jobs) or again
        for job in begun:
            if not job.began:
                job.began = True
                self.order.append(job)
        self.check(work)
        return work

    def compute(self, job: Job, work: dict[Job, Work]) -> None:
        sequence, chunks = work[job]
        sequence.chunks_done(chunks)
        if not chunks[-1].logits:
            return
        assert sequence.cached == len(sequence.tokens)
        sequence.tokens.append(len(sequence.tokens) % 3)
        if not job.prompt_done:
            job.prompt_done = True
            self.prefix.publish(sequence)
        if sequence.completion_tokens == sequence.max_tokens:
            self.prefix.keep(sequence)
            self.end(job)
            self.ended.append(job)

    def end(self, job: Job) -> None:
        """End a job, whose pages somebody has taken."""
        self.scheduler.end(job)
        self.jobs.remove(job)

    def check(self, work: dict[Job, Work]) -> None:
        scheduler, pool = self.scheduler, self.cache.pool
        running = scheduler.running
        assert sorted(map(id, [*running, *scheduler.queue])) == sorted(map(id, self.jobs))
        assert len(running) <= self.options["max_running"]
        assert all(n <= self.options["max_running_per_key"] for n in Counter(job.key for job in running).values())
        assert not any(job.sequence.pages or job.sequence.cached for job in scheduler.queue)
        # Pages: each in use, in the tree or free; those that are written belong to one sequence.
        tree = {node.page for _, node in self.prefix.nodes() if node.page is not None}
        used = Counter(page for job in running for page in job.sequence.pages)
        assert pool.available == pool.pages - len(tree | used.keys())
        assert all(pool.users(page) == used[page] + (page in tree) for page in tree | used.keys())
        for job, (sequence, chunks) in work.items():
            assert job in running
            assert sequence is job.sequence
            start = sequence.cached
            for chunk in chunks:
                assert (chunk.cached, [*chunk.token_ids]) == (
                    start,
                    sequence.tokens[start : start + len(chunk.token_ids)],
                )
                start += len(chunk.token_ids)
            assert len(sequence.pages) == self.cache.pages_for(start)
            for page in sequence.pages[sequence.cached // PAGE :]:
                assert pool.users(page) == 1
        # Tokens: within the budget, or the decoding sequences and a portion of one prompt.
        sizes = [sum(len(chunk.token_ids) for chunk in chunks) for _, chunks in work.values()]
        prompts = [job for job in work if job.sequence.remaining > 1]
        portion = max([scheduler._portion, *(job.sequence.block_tokens for job in prompts)])
        assert sum(sizes) <= self.most_tokens
        assert sum(sizes) <= max(self.step_tokens, len(work) - len(prompts) + (portion if prompts else 0))


@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("ram_pages", [0, 5])
def test_random_schedules_keep_every_page_and_end(block: int, ram_pages: int) -> None:
    """Requests come, are cancelled, fail and give up pages by chance; all that are left end."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    machine = Machine(
        24,
        ram_pages=ram_pages,
        step_tokens=chance.choice([1, 5, 16]),
        max_running=6,
        max_running_per_key=chance.choice([2, 6]),
    )
    for _ in range(1500):
        for _ in range(chance.choice([0, 0, 0, 1, 3])):
            if len(machine.jobs) < 20:
                stem = [0] * chance.randrange(40)
                tokens = [*stem, *[chance.randrange(3) for _ in range(chance.randrange(1, 20))]]
                options: dict[str, Any] = {
                    "key": chance.choice("abc"),
                    "seed": chance.choice([None, 1]),
                    "block": block,
                }
                machine.add(make_job(tokens, chance.randrange(1, 96 - len(tokens)), **options))
        work = machine.plan()
        failed = chance.random() < 0.05
        for job in [*work]:
            if failed and chance.random() < 0.5:
                machine.prefix.take_back(job.sequence)
                machine.end(job)
            else:
                machine.compute(job, work)
        if machine.jobs and chance.random() < 0.1:
            job = chance.choice(machine.jobs)
            machine.prefix.keep(job.sequence)
            machine.end(job)
        if chance.random() < 0.005:
            machine.prefix.release()
    limit = 20 * 96 * 6
    while machine.jobs:
        machine.step()
        limit -= 1
        assert limit, "no end"
    assert machine.scheduler.preemptions > 0
    machine.prefix.release()
    assert machine.cache.pool.available == 24
    assert not machine.scheduler.queue._served


def test_the_oldest_ends_first_where_pages_are_short() -> None:
    machine = Machine(12)
    jobs = [machine.add(make_job([number] * 8, 36)) for number in range(4)]
    while machine.jobs:
        machine.step()
    assert machine.ended == jobs
    assert machine.scheduler.preemptions > 0


def test_a_job_that_gave_up_its_pages_does_not_come_back_before_there_is_room() -> None:
    """Or it would compute its prompt again and again for a token at a time."""
    machine = Machine(12, most_tokens=64)
    for number in range(4):
        machine.add(make_job([number] * 8, 36))
    computed = 0
    while machine.jobs:
        computed += sum(len(chunk.token_ids) for _, chunks in machine.step().values() for chunk in chunks)
    assert machine.scheduler.preemptions <= 6
    assert computed <= 2 * 4 * 44


def test_a_key_pays_once_for_what_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(12)
    charged: Counter[str] = Counter()
    monkeypatch.setattr(machine.scheduler.queue, "charge", lambda key, tokens: charged.update({key: tokens}))
    jobs = [machine.add(make_job([number] * 8, 36, key=str(number), seed=1, block=3)) for number in range(4)]
    while machine.jobs:
        machine.step()
    assert machine.scheduler.preemptions > 0
    assert charged == {job.key: 8 + 35 for job in jobs}


def test_new_prompts_do_not_keep_an_old_one_waiting() -> None:
    """With a new short request in every step, and a budget for one prompt at a time."""
    machine = Machine(100, step_tokens=8)
    long = machine.add(make_job([1] * 80, 1))
    steps = 0
    while long in machine.jobs:
        machine.add(make_job([2] * 8, 1, key=f"key {steps}"))
        machine.step()
        steps += 1
    assert steps <= 2 * 80 // 8 + 4


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    machine = Machine(100, step_tokens=8)
    machine.add(make_job([1] * 200, 1))
    machine.step()
    short = machine.add(make_job([2] * 8, 1))
    machine.step()
    machine.step()
    assert short in machine.ended


def test_replies_go_on_beside_a_long_prompt() -> None:
    machine = Machine(200, step_tokens=8, most_tokens=64)
    replies = [machine.add(make_job([number], 100)) for number in range(3)]
    machine.step()
    machine.add(make_job([9] * 300, 1))
    for _ in range(20):
        work = machine.step()
        assert all(job in work for job in replies)
        assert sum(len(chunk.token_ids) for _, chunks in work.values() for chunk in chunks) == 8


@pytest.mark.parametrize("prompts", [0, 2])
def test_more_sequences_than_a_step_takes_go_on_in_turns(prompts: int) -> None:
    machine = Machine(400, most_tokens=8, max_running=30, max_running_per_key=30)
    replies = [machine.add(make_job([number], 60)) for number in range(20)]
    for _ in range(4):
        machine.step()
    for number in range(prompts):
        machine.add(make_job([20 + number] * 400, 1))
    turns: Counter[Job] = Counter()
    for _ in range(60):
        turns.update(job for job in machine.step() if job in replies)
    assert min(turns[job] for job in replies) >= max(turns.values()) - 1 > 1


def test_to_look_again_for_pages_costs_nothing_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(12)
    machine.add(make_job([1] * 30, 12))
    for _ in range(3):
        machine.step()
    machine.add(make_job([2] * 40, 1))
    asked: list[TokenSequence] = []
    in_use = machine.prefix.in_use
    monkeypatch.setattr(machine.prefix, "in_use", lambda sequence: asked.append(sequence) or in_use(sequence))
    while machine.jobs:
        machine.step()
    assert len(machine.ended) == 2
    assert len(asked) <= 2


@pytest.mark.parametrize("reply", [1, 30])
def test_keys_get_the_same_tokens_whoever_asks_for_one_thing_after_the_other(reply: int) -> None:
    """One key always has many waiting; the other sends a large request when its last has ended."""
    machine = Machine(100, max_running=1)
    taken: Counter[str] = Counter()
    for _ in range(2000):
        while sum(job.key == "patient" for job in machine.jobs) < 3:
            machine.add(make_job([1, 2], 3, key="patient"))
        if not any(job.key == "greedy" for job in machine.jobs):
            machine.add(make_job([3] * 50, reply, key="greedy", seed=1, block=8))
        for job, (_, chunks) in machine.step().items():
            taken[job.key] += sum(len(chunk.token_ids) for chunk in chunks)
        machine.prefix.release()
    assert taken["greedy"] <= 1.2 * taken["patient"] + 200

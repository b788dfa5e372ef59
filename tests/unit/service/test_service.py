"""Many requests at once on random models: the same bits as alone, and nothing left behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_k2.engine import Engine, SamplingParams, request
from hybrid_k2.engine.generation import Runner, Work
from hybrid_k2.engine.sequence import LOGIT_TOKENS
from hybrid_k2.engine.service_types import (
    Finished,
    Piece,
    QueueFullError,
    ServiceClosingError,
    ServiceOptions,
    ServiceRequest,
)
from hybrid_k2.errors import ConfigError, EngineError, RequestError
from tests.engines import generated
from tests.services import CHUNK, PARAMS, TIMEOUT_S, Client, alone, random_ids, same, serve


@pytest.mark.parametrize("ram_pages", [0, 20])
@pytest.mark.parametrize("step_tokens", [1, 20, None])
def test_replies_are_those_of_each_request_alone(engine: Engine, step_tokens: int | None, ram_pages: int) -> None:
    """Requests come and go by chance, with common beginnings, in a cache that is too small for all of them."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    stems = [random_ids(chance, length) for length in (40, 100, 130)]
    jobs = []
    for number in range(24):
        prompt = chance.choice(stems)[: chance.choice([130, 130, chance.randrange(1, 130)])] + random_ids(
            chance, chance.choice([0, 3, 70])
        )
        params = replace(PARAMS, seed=number, max_tokens=chance.choice([1, 8, 60]))
        params = replace(params, prompt_logprobs=chance.random() < 0.3)
        jobs.append((prompt, params, alone(engine, prompt, params)))
    engine._prefix.release()
    ram_bytes = ram_pages * engine._cache.page_like().nbytes
    with serve(engine, step_tokens=step_tokens, max_running=6, cache_ram_bytes=ram_bytes) as service:
        clients = []
        for prompt, params, _ in jobs:
            clients.append(Client(service, prompt, params, key=chance.choice("abc")))
            time.sleep(chance.choice([0, 0, 0.02]))
            if chance.random() < 0.3:
                chance.choice(clients).ticket.cancel()
        for client, (_, _, expected) in zip(clients, jobs, strict=True):
            if client.reply.finish_reason == "cancelled":
                count = len(client.reply.token_ids)
                assert client.reply.token_ids == expected.token_ids[:count]
            else:
                assert same(client.reply, expected)
        stats = service.stats()
        assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)
        assert (stats.requests, stats.finished, stats.failed) == (24, 24, 0)
        assert stats.prefix_hit_tokens > 0


def test_a_sequence_that_gave_up_its_pages_goes_on_with_the_same_bits(engine: Engine) -> None:
    chance = random.Random()
    jobs = [(random_ids(chance, 150), replace(PARAMS, seed=number, max_tokens=150)) for number in range(4)]
    expected = [alone(engine, *job) for job in jobs]
    engine._prefix.release()
    all_there = threading.Event()
    with serve(engine, max_running=4) as service:
        clients = [Client(service, *jobs[0], on_event=lambda client, event: all_there.wait(TIMEOUT_S))]
        clients += [Client(service, *job) for job in jobs[1:]]
        all_there.set()
        assert all(same(client.reply, reply) for client, reply in zip(clients, expected, strict=True))
        assert service.stats().preemptions > 0
        assert [len(client.progress) for client in clients] == [5] * 4  # the prompt is reported once
    assert [client.reply.usage for client in clients] == [reply.usage for reply in expected]


def test_choices_share_the_prompt(engine: Engine) -> None:
    chance = random.Random()
    prompt = random_ids(chance, 140)
    expected = [alone(engine, prompt, replace(PARAMS, seed=5 + choice)) for choice in range(3)]
    engine._prefix.release()
    with serve(engine) as service:
        client = Client(service, prompt, replace(PARAMS, seed=5), n=3)
        assert all(same(reply, one) for reply, one in zip(client.replies, expected, strict=True))
        assert [reply.usage.cached_tokens for reply in client.replies] == [0, 128, 128]
        assert service.stats().prompt_tokens == 140 + 2 * 12
        assert [(one.done, one.total, one.cached) for one in client.progress] == [
            (done, 140, 0) for done in (0, 48, 96, 140)
        ]
        assert len({reply.token_ids for reply in client.replies}) == 3
    unseeded = replace(PARAMS, seed=None)
    with serve(engine) as service:
        seeds = {reply.seed for reply in Client(service, prompt, unseeded, n=3).replies}
        assert len(seeds) == 3


def test_a_long_prompt_does_not_stop_replies(engine: Engine) -> None:
    """Each step that computes a part of the prompt also brings the reply on, and is bounded."""
    chance = random.Random()
    with serve(engine, step_tokens=20) as service:
        sizes: list[tuple[int, int]] = []
        second: list[Client] = []

        def note(_: Client, event: object) -> None:
            if isinstance(event, Piece):
                stats = service.stats()
                sizes.append((stats.step_prompt_tokens, stats.step_sequences))
                if not second:
                    second.append(Client(service, random_ids(chance, 300), replace(PARAMS, max_tokens=3)))

        Client(service, random_ids(chance, 5), replace(PARAMS, max_tokens=100), on_event=note).wait()
        second[0].wait()
    beside = [tokens for tokens, sequences in sizes if sequences == 2 and tokens]
    assert len(beside) > 10
    assert max(beside) == 19


def test_prompts_take_turns(engine: Engine) -> None:
    """A short prompt behind a long one does not wait for all of it."""
    chance = random.Random()
    with serve(engine, step_tokens=16) as service:
        short: list[Client] = []
        before: list[int] = []  # pieces of the long one's reply at each event of the short one

        def note(long: Client, event: object) -> None:
            if not short and len(long.progress) == 2:
                request = random_ids(chance, 20), replace(PARAMS, max_tokens=1)
                short.append(Client(service, *request, on_event=lambda *_: before.append(len(long.pieces()))))

        Client(service, random_ids(chance, 400), PARAMS, on_event=note).wait()
        short[0].wait()
        assert set(before) == {0}


def test_one_prompt_at_a_time_has_all_its_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take memory, and reading them keeps the others waiting."""
    reading, forward = [], Runner.forward

    def watched(self: Runner, work: Sequence[Work]) -> list[torch.Tensor | None]:
        reading.append(sum(sequence.reads_prompt for sequence, _ in work))
        assert sum(chunk.logit_rows for _, chunks in work for chunk in chunks) <= LOGIT_TOKENS + len(work)
        return forward(self, work)

    monkeypatch.setattr(Runner, "forward", watched)
    chance = random.Random()
    with serve(engine, max_running=6) as service:
        params = replace(PARAMS, prompt_logprobs=True, max_tokens=5)
        clients = [Client(service, random_ids(chance, 10), params) for _ in range(4)]
        assert [len(client.reply.prompt_logprobs or ()) for client in clients] == [9] * 4
    assert max(reading) == 1


# Cancel


@pytest.mark.parametrize("when", ["queue", "prompt", "reply", "last"])
def test_cancel_at_any_point(engine: Engine, when: str) -> None:
    chance = random.Random()
    prompt = random_ids(chance, 200)
    params = replace(PARAMS, max_tokens=40)

    def at_point(client: Client, event: object) -> None:
        if (when, len(client.progress)) == ("prompt", 3) or (when == "reply" and len(client.pieces()) == 5):
            client.ticket.cancel()
        if when == "last" and isinstance(event, Finished):
            client.ticket.cancel()

    with serve(engine, max_running=1) as service:
        first = Client(service, random_ids(chance, 20), replace(PARAMS, max_tokens=500))
        client = Client(service, prompt, params, n=2, on_event=at_point)
        if when == "queue":
            client.ticket.cancel()
        first.ticket.cancel()
        reasons = [reply.finish_reason for reply in client.replies]
        assert reasons[0] == ("length" if when == "last" else "cancelled")
        assert reasons[1] == "cancelled"
        tokens = len(client.replies[0].token_ids)
        assert tokens == {"queue": 0, "prompt": 0, "reply": tokens, "last": 40}[when]
        assert tokens or when != "reply"
        assert Client(service, prompt, replace(params, max_tokens=2)).reply.finish_reason == "length"


def test_a_reader_that_fails_ends_its_own_request(engine: Engine) -> None:
    def fail(client: Client, event: object) -> None:
        if len(client.pieces()) == 3:
            raise OSError("gone")

    chance = random.Random()
    with serve(engine) as service:
        broken = Client(service, random_ids(chance, 20), replace(PARAMS, max_tokens=400), on_event=fail)
        other = Client(service, random_ids(chance, 20), PARAMS)
        assert other.reply.finish_reason == "length"
        assert service.drain(60)
        assert len(broken.pieces()) == 3
        assert service.stats().cancelled == 1


# Limits


def test_the_queue_is_bounded(engine: Engine) -> None:
    chance = random.Random()
    with serve(engine, max_running=1, max_waiting=3, max_waiting_per_key=1) as service:
        running = Client(service, random_ids(chance, 3), replace(PARAMS, max_tokens=600))
        while service.stats().running == 0:
            time.sleep(0.001)
        waiting = [Client(service, [1], PARAMS, key=key) for key in "ab"]
        with pytest.raises(QueueFullError, match="at most 1 waiting requests of one key") as of_key:
            service.submit(ServiceRequest(prompt=[1], key="a"), lambda event: None)
        waiting.append(Client(service, [1], PARAMS, key="c"))
        with pytest.raises(QueueFullError, match="at most 3 waiting requests, got one more") as of_queue:
            service.submit(ServiceRequest(prompt=[1], key="d"), lambda event: None)
        assert (of_key.value.reason, of_queue.value.reason) == ("key", "queue")
        assert 1 <= of_queue.value.retry_after_s <= 60
        assert service.stats().rejected == 2
        assert service.stats().waiting == 3
        running.ticket.cancel()
        assert all(client.reply.finish_reason == "length" for client in waiting)


def test_without_places_a_request_may_still_run(engine: Engine) -> None:
    with serve(engine, max_running=2, max_waiting=0) as service:
        clients = [Client(service, [1, 2, 3], replace(PARAMS, max_tokens=300)) for _ in range(2)]
        with pytest.raises(QueueFullError):
            service.submit(ServiceRequest(prompt=[1]), lambda event: None)
        for client in clients:
            client.ticket.cancel()


def test_a_key_runs_no_more_than_its_share(engine: Engine) -> None:
    with serve(engine, max_running=3, max_running_per_key=1) as service:
        running: list[int] = []

        def note(*_: object) -> None:
            running.append(service.stats().running)

        with service._changed:  # so that all of them wait for the first step
            clients = [Client(service, [1, 2, 3], PARAMS, key=key, on_event=note) for key in "aaab"]
        assert all(client.reply.finish_reason == "length" for client in clients)
    assert max(running) == 2


def test_keys_take_turns(engine: Engine) -> None:
    """Twenty requests of one key do not keep another's waiting for all of them."""
    waiting: list[int] = []
    with serve(engine, max_running=1) as service:
        with service._changed:  # so that all of them wait for the first step
            many = [Client(service, [1, 2, 3], PARAMS, key="a") for _ in range(20)]

            def count(*_: object) -> None:
                waiting.append(sum(not client.events for client in many))

            one = Client(service, [1, 2, 3], PARAMS, key="b", on_event=count)
        one.wait()
        assert min(waiting) > 10
        assert service.drain(60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_running": 0}, "max_running: expected an integer of at least 1, got 0"),
        ({"step_tokens": True}, "step_tokens: expected an integer of at least 1, got True"),
        ({"cache_path": Path("x")}, "cache_path: expected cache_ram_bytes above 0 with it"),
        (
            {"cache_ram_bytes": 1 << 60},
            "that the plan leaves on the host, got 1073741824.00 GiB",
        ),
        ({"step_tokens": CHUNK + 1}, rf"step_tokens: expected at most {CHUNK} \(chunk_tokens of the plan\), got 49"),
    ],
)
def test_options_that_do_not_fit(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve(engine, **options)
    assert generated(engine, [1, 2], max_tokens=1)


def test_the_cache_in_host_memory_takes_what_the_plan_leaves(engine: Engine) -> None:
    rules, mib = engine.plan.rules, 1 << 20
    devices = replace(rules.devices, host_memory_bytes=engine.plan.bytes_on("host") + mib)
    tight = replace(engine.plan, rules=replace(rules, devices=devices))
    ServiceOptions(cache_ram_bytes=mib).check(tight)
    with pytest.raises(ConfigError, match=r"expected at most the 1\.00 MiB that the plan leaves on the host"):
        ServiceOptions(cache_ram_bytes=mib + 1).check(tight)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "expected prompt or messages, got neither"),
        ({"prompt": []}, "prompt: expected at least one token"),
        ({"prompt": [1] * 641}, "prompt: expected at most 640 tokens"),
        ({"prompt": [1], "n": 17}, "n: expected an integer from 1 to 16, got 17"),
        ({"prompt": [1], "n": True}, "n: expected an integer from 1 to 16, got True"),
    ],
)
def test_a_wrong_request_is_refused_at_once(engine: Engine, request_: dict[str, Any], message: str) -> None:
    with serve(engine) as service:
        with pytest.raises(RequestError, match=message):
            service.submit(ServiceRequest(**request_), lambda event: None)
        assert service.stats().requests == 0


# Who calls does not wait


def test_nobody_waits_for_a_step_or_for_pages_that_are_copied(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(engine) as service:
        going, go = threading.Event(), threading.Event()
        next_step = service._scheduler.next_step

        def slow() -> Any:
            going.set()
            assert go.wait(60)
            return next_step()

        monkeypatch.setattr(service._scheduler, "next_step", slow)
        client = Client(service, [1, 2, 3], PARAMS)
        assert going.wait(60)
        done = threading.Event()

        def call() -> None:
            client.ticket.cancel()
            assert service.stats().waiting == 1
            Client(service, [1, 2, 3], PARAMS).ticket.cancel()
            done.set()

        caller = threading.Thread(target=call)
        caller.start()
        assert done.wait(30)
        go.set()
        caller.join()
        assert service.drain(60)
        assert service.stats().cancelled >= 1


def test_a_prompt_is_checked_once_for_all_choices(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    check_ids = request.check_ids
    monkeypatch.setattr(request, "check_ids", lambda ids, size: checked.append(1) or check_ids(ids, size))
    with serve(engine) as service:
        seeds = [reply.seed for reply in Client(service, [1, 2, 3], replace(PARAMS, seed=2**63 - 2), n=4).replies]
    assert len(checked) == 1
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63), -(2**63) + 1]


def test_a_full_queue_refuses_before_it_reads_the_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(engine, max_running=1, max_waiting=0) as service:
        running = Client(service, [1], replace(PARAMS, max_tokens=500))
        monkeypatch.setattr(engine, "sequences", lambda *_, **__: 1 / 0)
        with pytest.raises(QueueFullError):
            service.submit(ServiceRequest(prompt=[1]), lambda event: None)
        running.ticket.cancel()


def test_a_request_that_waits_takes_no_memory_of_the_vocabulary_and_one_prompt(engine: Engine) -> None:
    first, *others = engine.sequences(
        [1, 2], messages=None, tools=None, thinking=True, preserve_thinking=False, params=SamplingParams(), n=3
    )
    assert not any(isinstance(value, np.ndarray) and value.size > 1 for value in vars(first.sampler).values())
    assert all(other.tokens is first.tokens for other in others)
    first.sample(torch.zeros(engine.config.vocab_size))
    assert [len(sequence.tokens) for sequence in (first, *others)] == [3, 2, 2]


def test_many_callers_at_once_break_nothing(engine: Engine) -> None:
    """Submit, cancel, ask for the counts and leave, from many threads; then everything is free."""
    with serve(engine, max_running=4, max_waiting=1000) as service:

        def call(number: int) -> None:
            chance = random.Random(number)
            for _ in range(12):
                params = replace(PARAMS, max_tokens=chance.randrange(1, 20))
                prompt = random_ids(chance, chance.randrange(1, 60))
                client = Client(service, prompt, params, n=chance.choice([1, 1, 3]))
                service.stats()
                if chance.random() < 0.5:
                    client.ticket.cancel()
                client.wait()

        callers = [threading.Thread(target=call, args=(number,)) for number in range(6)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(TIMEOUT_S)
        stats = service.stats()
        assert (stats.running, stats.waiting, stats.kv_pages_used, stats.failed) == (0, 0, 0, 0)
        assert stats.requests == 72
        assert not service._tickets
        assert not service._scheduler.queue._served


# The end


def test_its_own_thread_cannot_close_it(engine: Engine) -> None:
    errors: list[EngineError] = []

    def close(client: Client, event: object) -> None:
        try:
            service.close()
        except EngineError as error:
            errors.append(error)

    with serve(engine) as service:
        assert Client(service, [1, 2], replace(PARAMS, max_tokens=1), on_event=close).reply.finish_reason == "length"
    assert "expected another thread to close it" in str(errors[0])


def test_drain_waits_and_takes_nothing_new(engine: Engine) -> None:
    with serve(engine) as service:
        client = Client(service, [1, 2, 3], replace(PARAMS, max_tokens=200))
        assert not service.drain(0)
        with pytest.raises(ServiceClosingError, match="shutting down"):
            service.submit(ServiceRequest(prompt=[1]), lambda event: None)
        assert service.drain(60)
        assert client.reply.finish_reason == "length"


def test_its_memory_for_prompts_is_given_back(engine: Engine) -> None:
    chance = random.Random()
    with serve(engine, cache_ram_bytes=50 * engine._cache.page_like().nbytes) as service:
        for _ in range(3):
            Client(service, random_ids(chance, 400), replace(PARAMS, max_tokens=1)).wait()
        assert service.stats().ram_pages_kept > 0
    assert engine._prefix.stored_pages == 0


def test_close_cancels_and_lets_go_of_the_engine(engine: Engine) -> None:
    service = serve(engine, max_running=1)
    clients = [Client(service, [1, 2, 3], replace(PARAMS, max_tokens=500), n=2) for _ in range(3)]
    with pytest.raises(RequestError, match="one request at a time"):
        generated(engine, [1], max_tokens=1)
    service.close()
    service.close()
    assert [reply.finish_reason for client in clients for reply in client.replies] == ["cancelled"] * 6
    assert generated(engine, [1], max_tokens=1).finish_reason == "length"
    with pytest.raises(ServiceClosingError, match="shutting down"):
        service.submit(ServiceRequest(prompt=[1]), lambda event: None)


def test_a_busy_engine_cannot_be_served(engine: Engine) -> None:
    generation = engine.generate([1, 2], params=PARAMS)
    next(generation)
    with pytest.raises(RequestError, match="one request at a time"):
        serve(engine)
    generation.close()
    serve(engine).close()


def test_the_cache_on_disk_serves_the_next_start(engine: Engine, tmp_path: Path) -> None:
    chance = random.Random()
    prompt = random_ids(chance, 200)
    expected = alone(engine, prompt, PARAMS)
    options = {"cache_ram_bytes": 50 * engine._cache.page_like().nbytes, "cache_path": tmp_path / "cache"}
    with serve(engine, **options) as service:
        assert same(Client(service, prompt, PARAMS).reply, expected)
    engine._prefix.release()
    with serve(engine, **options) as service:
        assert service.stats().ram_pages_kept > 0
        again = Client(service, prompt, PARAMS).reply
        assert again.usage.cached_tokens == 199
        assert same(again, expected)


def test_salts_keep_keys_apart(engine: Engine) -> None:
    prompt = random_ids(random.Random(), 200)
    with serve(engine) as service:
        cached = [Client(service, prompt, PARAMS, cache_salt=salt).reply.usage.cached_tokens for salt in "aabb"]
    assert cached == [0, 199, 0, 199]


@pytest.mark.parametrize("rules", ["host", "twin"])
def test_the_demo_model_keeps_its_bits_in_company(rules: str) -> None:
    chance = random.Random()
    with Engine.load("demo", rules) as engine:
        jobs = [
            ([chance.randrange(1500) for _ in range(length)], replace(PARAMS, seed=length)) for length in (5, 40, 600)
        ]
        expected = [alone(engine, *job) for job in jobs]
        engine._prefix.release()
        with serve(engine) as service:
            clients = [Client(service, *job) for job in jobs]
            assert all(same(client.reply, reply) for client, reply in zip(clients, expected, strict=True))

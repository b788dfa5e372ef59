"""Requests that fail, readers and models that do: who is told, and what goes on."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybrid_k2.engine import Engine
from hybrid_k2.engine.sampling import Sampler
from hybrid_k2.engine.service_types import (
    ServiceRequest,
)
from hybrid_k2.errors import EngineError, RequestError
from tests.services import ODD, PARAMS, Client, alone, random_ids, same, serve


def test_logits_that_are_not_finite_end_one_request(engine: Engine) -> None:
    """Only one prompt meets the damaged row of the embedding."""
    chance = random.Random()
    prompts = [random_ids(chance, 30) for _ in range(3)]
    expected = [alone(engine, prompt, replace(PARAMS, max_tokens=100)) for prompt in prompts]
    row = engine.loaded.text.embedding[ODD]
    before = row.clone()
    row.fill_(float("nan"))
    try:
        with serve(engine) as service:
            good = [Client(service, prompt, replace(PARAMS, max_tokens=100)) for prompt in prompts]
            bad = Client(service, [*prompts[0], ODD], PARAMS, n=2)
            assert isinstance(bad.error, EngineError)
            assert "expected finite values" in str(bad.error)
            assert all(same(client.reply, reply) for client, reply in zip(good, expected, strict=True))
            assert service.stats().failed == 1
    finally:
        row.copy_(before)


class Fault:
    """Let forward passes fail."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = lambda batch: False
        self.error: Exception = EngineError("experts: layer 1 did not answer")
        forward = engine.loaded.text.forward

        def maybe(batch: Any, cache: Any) -> torch.Tensor:
            if self.fails(batch):
                raise self.error
            return forward(batch, cache)

        monkeypatch.setattr(engine.loaded.text, "forward", maybe)


def test_a_step_that_fails_once_harms_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random()
    jobs = [(random_ids(chance, 60), replace(PARAMS, seed=number, max_tokens=60)) for number in range(4)]
    expected = [alone(engine, *job) for job in jobs]
    fault = Fault(engine, monkeypatch)
    fault.fails = lambda batch: sum(not part.follows for part in batch.sequences) > 1 and chance.random() < 0.3
    with serve(engine, step_tokens=20) as service:
        clients = [Client(service, *job) for job in jobs]
        assert all(same(client.reply, reply) for client, reply in zip(clients, expected, strict=True))
        assert service.stats().failed_steps > 0
        assert service.stats().failed == 0


@pytest.mark.parametrize("error", [EngineError("no answer"), RuntimeError("a bug"), MemoryError()])
def test_the_request_to_blame_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    chance = random.Random()
    jobs = [([*random_ids(chance, 60)], replace(PARAMS, seed=number, max_tokens=60)) for number in range(3)]
    expected = [alone(engine, *job) for job in jobs]
    fault = Fault(engine, monkeypatch)
    fault.error, fault.fails = error, lambda batch: ODD in batch.token_ids.tolist()
    with serve(engine) as service:
        clients = [Client(service, *job) for job in jobs]
        bad = Client(service, [*random_ids(chance, 40), ODD], PARAMS)
        assert isinstance(bad.error, EngineError)
        assert str(error) in str(bad.error)
        assert all(same(client.reply, reply) for client, reply in zip(clients, expected, strict=True))
        assert service.stats().healthy


def test_a_dead_model_fails_everyone_and_is_seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(engine, monkeypatch)
    tries: list[int] = []
    fault.fails = lambda batch: not tries.append(1)
    gate = threading.Event()
    with serve(engine, max_running=6) as service:
        with service._changed:  # so that all of them are in the first step
            clients = [Client(service, [1, 2, number], PARAMS) for number in range(6)]
        gate.set()
        assert all("did not answer" in str(client.error) for client in clients)
        assert len(tries) == 3  # together, and two alone
        assert not service.stats().healthy
        fault.fails = lambda batch: False
        assert Client(service, [1, 2, 3], PARAMS).reply.finish_reason == "length"
        assert service.stats().healthy


def test_an_error_in_the_service_itself_ends_it_with_an_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(engine) as service:
        monkeypatch.setattr(service._scheduler, "next_step", lambda: 1 / 0)
        assert "ZeroDivisionError" in str(Client(service, [1], PARAMS, n=2).error)
        assert service.drain(60)
        with pytest.raises(EngineError, match="service: it cannot go on"):
            service.submit(ServiceRequest(prompt=[1]), lambda event: None)


def test_a_parser_that_fails_at_a_cancel_ends_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(engine) as service:
        bad = Client(service, [1, 2, 3], replace(PARAMS, max_tokens=500), n=2)
        good = Client(service, [4, 5, 6], replace(PARAMS, max_tokens=60))
        while not bad.pieces(1):
            time.sleep(0.001)
        for job in [*service._tickets]:
            if job.sequence.prompt_tokens == 3 and job.sequence.tokens[0] == 1:
                monkeypatch.setattr(job.sequence.output, "finish", lambda: 1 / 0)
        bad.ticket.cancel()
        assert "ZeroDivisionError" in str(bad.error)
        assert good.reply.finish_reason == "length"
        assert service.stats().failed == 1


def test_a_request_that_fails_by_itself_says_nothing_of_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar beyond its bounds, say, where nobody else is served: the server is as healthy as before."""

    def refuse(*_: object) -> int:
        raise RequestError("grammar: expected it within its bounds")

    with serve(engine) as service:
        monkeypatch.setattr(Sampler, "sample", refuse)
        assert "within its bounds" in str(Client(service, [1, 2], PARAMS).error)
        assert service.stats().healthy


def test_only_logits_that_are_not_finite_empty_the_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request brought upon itself costs nobody else the latents of his prompt."""
    prompt = random_ids(random.Random(), 200)
    with serve(engine) as service:
        assert Client(service, prompt, PARAMS).reply.finish_reason == "length"
        monkeypatch.setattr(Sampler, "sample", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in str(Client(service, [1, 2], PARAMS).error)
        monkeypatch.undo()
        assert Client(service, prompt, PARAMS).reply.usage.cached_tokens == 199

"""A server that is told to end, or whose model fails, while it loads."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from hybrid_k2.errors import CheckpointError
from hybrid_k2.protocol import Tokenizer
from hybrid_k2.server.app import create_app
from hybrid_k2.server.backend import Backend, Served
from hybrid_k2.server.listen import Listener, listen_tcp
from hybrid_k2.server.options import Limits, ServerOptions
from hybrid_k2.server.process import Process
from tests.server.scripted import ScriptedService

Report = Callable[[int, int], None]


@pytest.fixture
def listener() -> Listener:
    return listen_tcp("127.0.0.1", 0, tls=False)


@pytest.fixture
def process(listener: Listener) -> Process:
    backend = Backend()
    app = create_app(backend, ServerOptions(model_names=("k2",)))
    return Process(app=app, backend=backend, listener=listener, limits=Limits(), drain_s=1)


def health(listener: Listener) -> tuple[int, Any]:
    with httpx.Client(transport=httpx.HTTPTransport(retries=20)) as client:
        response = client.get(f"{listener.address}/health", timeout=60)
    return response.status_code, response.json()


def test_a_signal_ends_the_loading(process: Process, listener: Listener) -> None:
    seen = []

    def load(report: Report) -> Served:
        report(30, 120)
        seen.append(health(listener))
        os.kill(os.getpid(), signal.SIGTERM)
        while True:  # until the progress is refused
            report(60, 120)

    before = signal.getsignal(signal.SIGTERM)
    process.run(load)
    ((status, body),) = seen
    assert (status, body["status"]) == (503, "loading")
    assert body["progress"] == {"read_bytes": 30, "total_bytes": 120, "share": 0.25}
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_model_that_fails_to_load_is_the_error_of_the_server(process: Process, listener: Listener) -> None:
    def load(report: Report) -> Served:
        health(listener)
        raise CheckpointError("weights: expected whole ones")

    with pytest.raises(CheckpointError, match="whole ones"):
        process.run(load)


def test_what_was_loaded_is_closed(process: Process, listener: Listener, tokenizer: Tokenizer) -> None:
    service = ScriptedService(tokenizer)
    model_closed = []

    def load(report: Report) -> Served:
        health(listener)
        os.kill(os.getpid(), signal.SIGINT)
        return Served(_Model(tokenizer, model_closed), service)  # type: ignore[arg-type]

    process.run(load)
    assert service.closed
    assert model_closed == [True]


class _Model:
    context_tokens = 10

    def __init__(self, tokenizer: Tokenizer, closed: list[bool]) -> None:
        self.tokenizer = tokenizer
        self._closed = closed

    def close(self) -> None:
        self._closed.append(True)

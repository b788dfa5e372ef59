"""The load that `python -m bench.serve` puts on a server: it runs, and it notices what is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.serve.checkpoint import write_served_slice
from bench.serve.pool import good_requests
from bench.serve.process import OwnServer, Server
from bench.serve.replies import stream_reply, text_of
from bench.serve.soak import soak
from bench.serve.throughput import throughput
from hybrid_k2 import Engine, SamplingParams
from tests.cli.conftest import ONE_THREAD
from tests.cli.socket_server import CHAT, as_json, response, saying, stream

FIGURES = """hybrid_k2_num_requests_running 0.0
hybrid_k2_num_requests_waiting 0.0
hybrid_k2_kv_cache_pages_used 2.0
hybrid_k2_kv_cache_pages_kept 1.0
hybrid_k2_kv_cache_pages 8.0
hybrid_k2_num_preemptions_total 0.0
hybrid_k2_engine_failed_steps_total 0.0
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    own = OwnServer(tmp_path_factory.mktemp("server"), "demo", threads="1", kv_tokens=2048, options=[])
    asyncio.run(own.wait_ready())
    yield own
    assert own.stop() == 0
    assert own.errors() == []


def test_a_short_soak_finds_nothing(server: OwnServer) -> None:
    found = asyncio.run(
        soak(server, streams=4, seconds=2, warm_up_s=0.5, pool=6, seed=2, patience_s=120, max_growth=0.5)
    )
    assert found["failures"] == []
    assert found["requests"]["read"] > 0
    assert found["rss"]["samples"] > 0


def test_throughput_counts_all_streams(server: OwnServer) -> None:
    found = asyncio.run(throughput(server, counts=[1, 3], tokens=4, rounds=1))
    assert found["tokens_per_s"].keys() == found["ratio"].keys() == {"1", "3"}
    assert found["ratio"]["1"] == 1


def test_the_pool_is_the_same_each_time(server: OwnServer) -> None:
    request = good_requests(4, seed=9)[3]
    assert request == good_requests(4, seed=9)[3]
    said = [text_of(asyncio.run(stream_reply(server, one))) for one in (request, request, {**request, "seed": 1})]
    assert said[0] == said[1]
    assert "get_weather" in said[0]


def test_a_soak_notices_other_words_pages_that_stay_and_nonsense_that_is_taken() -> None:
    """A server that answers each request in other words, and never refuses."""

    def answer(words: str) -> bytes:
        frame: dict[str, Any] = {"index": 0, "delta": {"content": words}, "finish_reason": None}
        return stream({"choices": [frame]}, {"choices": [{**frame, "delta": {}, "finish_reason": "stop"}]})

    answers = {CHAT: [chunked(answer(f"reply {n}")) for n in range(5000)], "/metrics": response(200, FIGURES.encode())}
    with saying(answers) as liar:
        found = asyncio.run(
            soak(Server(liar.url, None), streams=2, seconds=1, warm_up_s=0, pool=3, seed=1, patience_s=20, quiet_s=0.1)
        )
    failures = "\n".join(found["failures"])
    assert "expected, as alone," in failures
    assert "malformed" in failures
    assert "expected kv_cache_pages_used 0, got 2" in failures


def chunked(whole: bytes) -> bytes:
    head, _, body = whole.partition(b"\r\n\r\n")
    return head + b"\r\ntransfer-encoding: chunked\r\n\r\n" + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"


def test_a_request_that_is_refused_is_a_failure() -> None:
    busy = as_json({"error": {"message": "busy"}}, 503)
    good = chunked(stream({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
    with saying({CHAT: [good, *[busy] * 5000], "/metrics": response(200, FIGURES.encode())}) as server:
        found = asyncio.run(
            soak(Server(server.url, None), streams=1, seconds=1, warm_up_s=0, pool=1, seed=1, patience_s=20, quiet_s=0)
        )
    assert "503" in "\n".join(found["failures"])


def test_a_slice_can_be_served(tmp_path: Path) -> None:
    write_served_slice(tmp_path, layers=2, experts=8, scale=8)
    with Engine.load(tmp_path, ONE_THREAD[1]) as engine:
        params = SamplingParams(max_tokens=3, ignore_eos=True, seed=1)
        reply = engine.chat([{"role": "user", "content": "hi"}], params=params)
    assert len(reply.token_ids) == 3

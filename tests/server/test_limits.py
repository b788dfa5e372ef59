"""Bodies of all requests together, room for connections, and large answers: bounded, and given back."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from hybrid_k2.server.accept import BoundedListener
from hybrid_k2.server.body import INLINE_BYTES
from hybrid_k2.server.limits import PIECE_BYTES, VALUE_BYTES, RequestLimits
from hybrid_k2.server.listen import allow_connections
from hybrid_k2.server.options import Limits
from tests.server.conftest import Client, run
from tests.server.scripted import Script, ScriptedService

BOUNDS = Limits(body_bytes=1000, all_bodies_bytes=1500)


class App:
    """Answer 200 with the size of the body; a request for /wait is held until it may go on, /fail is a bug."""

    def __init__(self) -> None:
        self.arrived, self.released = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        if scope["path"] == "/wait":
            self.arrived.set()
            await self.released.wait()
        if scope["path"] == "/fail":
            raise IndexError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % len(body)})


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    """A body without a length beforehand."""
    for start in range(0, len(body), 100):
        yield body[start : start + 100]


def beside_another(body: bytes, test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Run a test while the server holds a body, and then see that it holds nothing any more."""

    async def call() -> None:
        app = App()
        transport = httpx.ASGITransport(RequestLimits(app, BOUNDS), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            first = asyncio.ensure_future(client.post("/wait", content=body))
            await app.arrived.wait()
            await test(client)
            app.released.set()
            assert (await first).text == str(len(body))
            whole = await asyncio.gather(*(client.post("/", content=bytes(750)) for _ in range(2)))
            assert [response.status_code for response in whole] == [200, 200], "all room was given back"

    run(call())


@pytest.mark.parametrize("send_as", [bytes, pieces])
def test_a_body_that_finds_no_room_beside_others_is_refused(send_as: Callable[[bytes], Any]) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        response = await client.post("/", content=send_as(bytes(501)))
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("overloaded_error", "bodies_full")
        assert (await client.post("/", content=send_as(bytes(1001)))).status_code in (413, 503)
        assert (await client.post("/fail", content=send_as(bytes(500)))).status_code == 500
        assert (await client.post("/", content=send_as(bytes(500)))).text == "500"

    beside_another(bytes(1000), test)


def test_values_count_as_what_they_become() -> None:
    body = b"," * (1500 // (1 + VALUE_BYTES))

    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.post("/", content=b"," + bytes(100))).status_code == 503
        assert (await client.post("/", content=b"")).status_code == 200, "what asks without a body is answered"

    beside_another(body, test)


def test_one_body_alone_may_be_larger_than_all() -> None:
    async def call() -> None:
        limits = RequestLimits(App(), Limits(body_bytes=1000, all_bodies_bytes=10))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(limits), base_url="http://server") as client:
            for _ in range(2):
                assert (await client.post("/", content=pieces(bytes(1000)))).text == "1000"

    run(call())


def test_a_client_that_goes_gives_its_room_back() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        sent = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            yield bytes(500)
            sent.set()
            await asyncio.Event().wait()

        call = asyncio.ensure_future(client.post("/", content=endless()))
        await sent.wait()
        assert (await client.post("/", content=b"x")).status_code == 503
        call.cancel()
        await asyncio.wait({call})
        assert (await client.post("/", content=bytes(500))).status_code == 200

    beside_another(bytes(1000), test)


def test_a_large_answer_is_sent_bit_by_bit() -> None:
    content = bytes(range(256)) * (PIECE_BYTES // 100)
    sent: list[Message] = []

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": content})

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    run(RequestLimits(large, Limits())({"type": "http", "headers": []}, receive, send))
    assert max(len(message.get("body", b"")) for message in sent) <= PIECE_BYTES
    assert b"".join(message.get("body", b"") for message in sent) == content * 2
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * (len(sent) - 2) + [False]


def test_more_connections_than_may_be_open_are_not_kept() -> None:
    with BoundedListener(socket.create_server(("127.0.0.1", 0)), most=2) as listening, ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(listening.getsockname()))

        clients = [connect() for _ in range(3)]
        first, _ = listening.accept()
        second, _ = listening.accept()
        with pytest.raises(BlockingIOError):
            listening.accept()
        assert clients[2].recv(1) == b"", "it was closed"
        first.sendall(b"a")
        assert clients[0].recv(1) == b"a"
        first.close()
        first.close()
        connect()
        third, _ = listening.accept()
        socket.close(second.detach())
        del second  # closed by another hand
        gc.collect()
        connect()
        fourth, _ = listening.accept()
        connect()
        with pytest.raises(BlockingIOError):
            listening.accept()
        third.close()
        fourth.close()


def test_the_process_may_open_the_files_that_its_connections_need() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, before[1]))
        allow_connections(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 500, "it is enough"
        allow_connections(300)
        assert 600 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Bound(int):
    """A limit that knows on which threads it was compared."""

    threads: set[threading.Thread]

    def __lt__(self, size: int) -> bool:
        self.threads.add(threading.current_thread())
        return int(self) < size


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/messages", {"max_tokens": 5}),
        ("/v1/messages/count_tokens", {}),
        ("/v1/tokenizers/estimate-token-count", {}),
        ("/v1/responses", None),
    ],
)
def test_a_large_body_is_not_checked_where_others_wait(
    make_client: Callable[..., Client], service: ScriptedService, path: str, body: dict[str, Any] | None
) -> None:
    bound = Bound(10_000)
    bound.threads = set()
    client = make_client(limits=Limits(messages=bound))
    messages = [{"role": "user", "content": "a" * INLINE_BYTES}]
    service.scripts = [Script()]
    response = client.post(path, {"input": messages} if body is None else {"model": "k2", "messages": messages, **body})
    assert response.status_code in (200, 400), "where it is too long"
    assert bound.threads
    assert threading.current_thread() not in bound.threads, "that of the event loop"

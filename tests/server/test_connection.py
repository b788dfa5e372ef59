"""A client that sends or takes too slowly loses its connection, and nobody else's."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from hybrid_k2.server.connection import Connection
from hybrid_k2.server.limits import RequestLimits
from hybrid_k2.server.options import Limits

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
WAIT_S = 60.0  # of a busy machine
SHORT_S = 0.3
LONG_S = 600.0  # whatever the machine does meanwhile


class App:
    """Answer 200 at once, without a look at the body; `/large` has more bytes than any buffer takes."""

    def __init__(self) -> None:
        self.gone = threading.Event()  # a client went in the middle of /large

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % self.size(scope))]}
        )
        left = self.size(scope)
        while left:
            await send({"type": "http.response.body", "body": bytes(min(left, 2**16)), "more_body": True})
            left -= min(left, 2**16)
        await send({"type": "http.response.body", "body": b""})
        message: dict[str, Any] = {"type": ""}
        while scope["path"] == "/large" and message["type"] != "http.disconnect":
            message = cast(dict[str, Any], await receive())
        if scope["path"] == "/large":
            self.gone.set()

    @staticmethod
    def size(scope: Scope) -> int:
        return 2**26 if scope["path"] == "/large" else 0


@contextmanager
def serving(app: Any, **limits: float) -> Iterator[int]:
    """Run a server on a thread and give its port."""
    bound = Limits(**cast(Any, limits))
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(Connection, limits=bound)),
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=int(LONG_S),
        h11_max_incomplete_event_size=bound.header_bytes,
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(WAIT_S)


def connect(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.settimeout(WAIT_S)
    return client


def answer(client: socket.socket) -> bytes:
    """Read the head of a response that has no body."""
    got = b""
    while b"\r\n\r\n" not in got:
        piece = client.recv(1000)
        assert piece, got
        got += piece
    return got


def whole_answer(client: socket.socket) -> tuple[bytes, bytes]:
    """Read until the server closes; return head and body."""
    got = b""
    while piece := client.recv(2000):
        got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    return head, body


def drip(client: socket.socket, piece: bytes) -> None:
    """Send a little now and then."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        client.sendall(piece)
        time.sleep(0.05)


def closed(client: socket.socket) -> bool:
    """Wait for the end of a connection on which nothing more comes."""
    try:
        return client.recv(1000) == b""
    except ConnectionResetError:
        return True


def test_a_client_that_says_nothing() -> None:
    with serving(App(), head_s=SHORT_S) as port, connect(port) as client:
        began = time.monotonic()
        assert closed(client)
        assert time.monotonic() - began > SHORT_S / 2


def test_more_bytes_of_a_head_give_no_more_time() -> None:
    with serving(App(), head_s=SHORT_S) as port, connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            drip(client, b"x: y\r\n")


def test_a_head_that_comes_in_pieces_is_answered_and_the_next_one_has_its_own_time() -> None:
    with serving(App(), head_s=1.5) as port, connect(port) as client:
        client.sendall(GET[:9])
        time.sleep(0.1)
        client.sendall(GET[9:])
        assert answer(client).startswith(b"HTTP/1.1 200")
        time.sleep(1.6)  # idle connections are another matter
        client.sendall(GET)
        assert answer(client).startswith(b"HTTP/1.1 200")
        client.sendall(GET[:9])
        assert closed(client)


def test_the_rest_of_a_request_that_has_its_answer() -> None:
    with serving(App(), body_s=SHORT_S) as port, connect(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        assert answer(client).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionError):
            drip(client, b"x")


CODINGS = ["content-length: 33554432", "transfer-encoding: chunked"]


def send_body(client: socket.socket, coding: str) -> None:
    """Send the 32 MiB of a body in one of the codings."""
    piece = bytes(2**20)
    chunked = "chunked" in coding
    for _ in range(32):
        client.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
    client.sendall(b"0\r\n\r\n" if chunked else b"")


@pytest.mark.parametrize("coding", CODINGS)
def test_a_body_that_is_too_large_is_told_so_after_it_was_sent(coding: str) -> None:
    """Without a reset, which would take the answer from the client; and the connection goes on."""
    bound = Limits(body_bytes=1000)
    with serving(RequestLimits(App(), bound), head_s=LONG_S, body_s=LONG_S) as port, connect(port) as client:
        client.sendall(f"POST / HTTP/1.1\r\nhost: x\r\n{coding}\r\n\r\n".encode())
        send_body(client, coding)
        client.sendall(GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        head, rest = whole_answer(client)
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"HTTP/1.1 200 OK" in rest


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("closing", ["HTTP/1.1\r\nconnection: x, Close", "HTTP/1.0"])
def test_a_client_that_wants_no_other_answer_sends_its_large_body_first(coding: str, closing: str) -> None:
    bound = Limits(body_bytes=1000, body_s=LONG_S)
    with serving(RequestLimits(App(), bound), head_s=LONG_S, body_s=LONG_S) as port, connect(port) as client:
        client.sendall(f"POST / {closing}\r\nhost: x\r\n{coding}\r\n\r\n".encode())
        send_body(client, coding)
        assert whole_answer(client)[0].startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("request_head", "body"),
    [
        ("connection: close\r\nexpect: 100-continue\r\ncontent-length: 5000", b""),  # it waits for a word
        ("connection: close\r\ncontent-length: 5000", bytes(5000)),
        ("connection: close\r\ntransfer-encoding: chunked", b"5dc\r\n" + bytes(1500) + b"\r\n0\r\n\r\n"),
    ],
)
def test_what_is_refused_at_its_end_or_before_its_beginning_waits_for_nothing(request_head: str, body: bytes) -> None:
    bound = Limits(body_bytes=1000, body_s=LONG_S)
    with serving(RequestLimits(App(), bound), head_s=LONG_S, body_s=LONG_S) as port, connect(port) as client:
        client.sendall(f"POST / HTTP/1.1\r\nhost: x\r\n{request_head}\r\n\r\n".encode() + body)
        assert whole_answer(client)[0].startswith(b"HTTP/1.1 413 ")


def test_another_protocol_is_not_taken_up(caplog: pytest.LogCaptureFixture) -> None:
    with serving(App()) as port, connect(port) as client:
        client.sendall(GET.replace(b"\r\n\r\n", b"\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"))
        assert answer(client).startswith(b"HTTP/1.1 200")
    assert "upgrade" not in caplog.text.lower()


def test_a_client_that_takes_nothing() -> None:
    app = App()
    with serving(app, write_s=SHORT_S) as port, connect(port) as client:
        client.sendall(GET.replace(b"/ ", b"/large ", 1))
        assert app.gone.wait(WAIT_S)


def test_a_client_that_takes_little_at_a_time_gets_all() -> None:
    with serving(App(), write_s=2.0) as port, connect(port) as client:
        client.sendall(GET.replace(b"/ ", b"/large ", 1))
        got = 0
        for _ in range(10):  # longer than write_s in all
            time.sleep(0.25)
            got += len(client.recv(2**22))
        while got < 2**26 and (piece := client.recv(2**22)):
            got += len(piece)
    assert got > 2**26


def test_one_connection_too_many_is_told_so() -> None:
    with serving(App(), connections=2, head_s=LONG_S) as port, connect(port) as first, connect(port) as second:
        for client in (first, second):
            client.sendall(GET)
            answer(client)
        with connect(port) as third:
            head, body = whole_answer(third)
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 5" in head
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("overloaded_error", "too_many_connections")
        second.sendall(GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        whole_answer(second)  # its end: the server has let it go
        with connect(port) as fourth:
            fourth.sendall(GET)
            assert answer(fourth).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("head", "status", "words"),
    [
        (lambda: b"\x16\x03\x01 no HTTP\r\n\r\n", 400, "valid HTTP"),
        (lambda: b"GET / HTTP/1.1\r\nhost: x\r\nx-long: " + b"y" * 100_000, 431, "65536 bytes"),
        (lambda: b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", 501, "transfer-encoding"),
        (
            lambda: b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, chunked\r\n\r\n",
            501,
            "transfer-encoding",
        ),
        (lambda: b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400, "valid HTTP"),
        (lambda: b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: +1\r\n\r\n", 400, "valid HTTP"),
        (lambda: b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", 400, "valid HTTP"),
        (lambda: b"GET / HTTP/1.1\r\nhost: x\r\nx : y\r\n\r\n", 400, "valid HTTP"),
    ],
)
def test_what_is_no_request_is_a_json_error(head: Callable[[], bytes], status: int, words: str) -> None:
    with serving(App()) as port, connect(port) as client:
        client.sendall(head())
        start, body = whole_answer(client)
    assert start.startswith(b"HTTP/1.1 %d" % status)
    assert words in json.loads(body)["error"]["message"]


def test_a_bad_chunk_after_the_answer_only_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    with serving(App()) as port, connect(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        answer(client)
        client.sendall(b"no chunk\r\n")
        assert closed(client)
    assert "Fatal error" not in caplog.text

"""A server that says what a test wants, byte for byte, and then hangs up or stays silent."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MODELS = {"object": "list", "data": [{"id": "k2", "context_length": 1000}]}
TLS_HANDSHAKE = 22  # the first byte of a client that wants TLS
CHAT = "/v1/chat/completions"


def response(status: int, body: bytes, kind: str = "application/json", **headers: str) -> bytes:
    """Write a whole response."""
    lines = {"content-type": kind, "content-length": str(len(body)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body


def as_json(value: object, status: int = 200, **headers: str) -> bytes:
    """Write a whole response with JSON."""
    return response(status, json.dumps(value).encode(), **headers)


def stream(*frames: object, end: bytes = b"data: [DONE]\n\n", kind: str = "text/event-stream") -> bytes:
    """Write a stream that ends when the connection does."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode()
    return head + b"".join(b"data: " + json.dumps(frame).encode() + b"\n\n" for frame in frames) + end


def delta(finish_reason: str | None = None, **fields: object) -> dict[str, object]:
    """Return a frame with one increment."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


class SocketServer:
    """Answer each path with its bytes (of a list, the next each time) and hang up; unless `hold`: then the client must.

    `requests` has what was asked, `gone` is set when a client has hung up on a held connection.
    """

    def __init__(self, answers: dict[str, bytes | list[bytes]], hold: bool = False) -> None:
        self.answers = {"/v1/models": as_json(MODELS), "/health": as_json({"status": "ok"}), **answers}
        self.requests: list[bytes] = []
        self.gone = threading.Event()
        self._hold = hold
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _serve(self) -> None:
        with suppress(OSError):  # the socket is closed
            while True:
                client, _ = self._socket.accept()
                with client, suppress(ConnectionError):
                    self._answer(client)

    def _answer(self, client: socket.socket) -> None:
        request = _whole_request(client)
        if not request.startswith((b"GET ", b"POST ")):  # nothing, or the start of TLS
            client.sendall(response(400, b""))
            return
        self.requests.append(request)
        path = request.split(b" ")[1].decode()
        answer = self.answers.get(path, as_json({"error": {"message": "no such route"}}, 404))
        client.sendall(answer.pop(0) if isinstance(answer, list) else answer)
        if self._hold and path == CHAT:
            client.settimeout(60)
            if not client.recv(1):
                self.gone.set()


def _whole_request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(65536)
        data += part
        if not part or part[0] == TLS_HANDSHAKE:
            return data
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line), 0)
    while len(body) < length:
        body += client.recv(65536)
    return head + b"\r\n\r\n" + body


@contextmanager
def saying(answers: dict[str, bytes | list[bytes]], hold: bool = False) -> Iterator[SocketServer]:
    """Run such a server for the length of a block."""
    server = SocketServer(answers, hold)
    try:
        yield server
    finally:
        server.close()

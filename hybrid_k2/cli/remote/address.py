"""Where a server is: what `--server` says, and the connection that leads there."""

from __future__ import annotations

import http.client
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

import typer

CONNECT_S = 10.0
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # seconds, seconds, times
_FORMS = "http://HOST:PORT, https://HOST:PORT or unix:PATH"


@dataclass(frozen=True)
class Address:
    """The address of a server; `text` is how messages name it."""

    text: str
    host: str = "localhost"
    port: int | None = None
    tls: bool = False
    prefix: str = ""  # of every path
    socket_path: str | None = None

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection; later on it waits as long as it takes, unless the other end is gone.

        Raises: OSError: the server cannot be reached, or its certificate is not trusted.
        """
        connection = self._connection()
        connection.connect()
        sock: socket.socket = connection.sock
        sock.settimeout(None)
        if self.socket_path is None:  # a peer that vanished without a word is noticed after a minute and a half
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return connection

    def _connection(self) -> http.client.HTTPConnection:
        if self.socket_path is not None:
            return _UnixConnection(self.socket_path)
        if self.tls:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.host, self.port, timeout=CONNECT_S, context=context)
        return http.client.HTTPConnection(self.host, self.port, timeout=CONNECT_S)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(CONNECT_S)
            self.sock.connect(self._path)
        except OSError:
            self.close()
            raise


def read_address(text: str) -> Address:
    """Read `http://HOST:PORT`, `https://HOST:PORT` (each with a path, where `/v1` at its end is of no account) or
    `unix:PATH`.

    Raises: typer.BadParameter.
    """  # fmt: skip
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or "\0" in path:
            raise _wrong(f"got {text!r}, which names no socket")
        return Address(text, socket_path=path)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _wrong(f"got one that is none: {error}") from None
    if "@" in parts.netloc:  # and it is not repeated: a password may stand there
        raise _wrong("got one with a user's name in it")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise _wrong(f"got {text!r}")
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise _wrong(f"got {text!r}, with characters that no address has")
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Address(f"{parts.scheme}://{parts.netloc}{prefix}", host, port, parts.scheme == "https", prefix)


def _wrong(got: str) -> typer.BadParameter:
    return typer.BadParameter(f"expected {_FORMS}, {got}", param_hint="--server")

"""A listening socket that accepts only so many connections at once.

`Connection` refuses one too many in words. It never meets that of a client which does not end its TLS handshake: those
would take all files of the process, and the event loop would write a traceback for each client that still comes.
"""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable
from typing import Any


class BoundedListener(socket.socket):
    """Accept no more connections than `most` at once; any more are closed without a word."""

    def __init__(self, listening: socket.socket, most: int) -> None:
        """Take over a socket that listens."""
        super().__init__(fileno=listening.detach())
        self._most = most
        self._open = 0

    def accept(self) -> tuple[socket.socket, Any]:
        """Return a connection and its address. Raises: BlockingIOError, also where it is one too many."""
        connection, address = super().accept()
        if self._open >= self._most:
            connection.close()
            raise BlockingIOError
        self._open += 1
        return _Counted(connection, self._let_go), address

    def _let_go(self) -> None:
        self._open -= 1


class _Counted(socket.socket):
    """A connection that says when it is closed, or forgotten."""

    def __init__(self, accepted: socket.socket, on_close: Callable[[], None]) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._on_close = weakref.finalize(self, on_close)  # once

    def close(self) -> None:
        """Close it. Closing twice is fine."""
        self._on_close()
        super().close()

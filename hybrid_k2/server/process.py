"""The life of a server process: it listens at once, loads the model meanwhile, serves, and drains when told to end."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from asyncio import Protocol
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from hybrid_k2.server.accept import BoundedListener
from hybrid_k2.server.backend import Backend, Served
from hybrid_k2.server.connection import Connection
from hybrid_k2.server.listen import REFUSED_AT_ONCE, Listener
from hybrid_k2.server.options import Limits

log = logging.getLogger("hybrid_k2.server")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MARGIN_S = 5  # after the drain: for the last bytes of streams to reach their clients
_IDLE_S = 75  # an idle connection is kept open so long; longer than clients and proxies keep theirs

Load = Callable[[Callable[[int, int], None]], Served]  # gets what takes the progress


class StoppedError(Exception):
    """The server was told to end while it loaded."""


@dataclass(frozen=True)
class Process:
    """What one server process runs with."""

    app: ASGIApp
    backend: Backend
    listener: Listener
    limits: Limits
    drain_s: float
    certificate: Path | None = None
    key: Path | None = None

    def run(self, load: Load) -> None:
        """Serve until SIGTERM or Ctrl-C; the model is loaded by `load` on another thread.

        The first signal drains: no new requests, those that run may end within `drain_s`. A second one ends at once.
        Raises: what `load` raises.
        """
        server = _Server(self._config(), self.backend, self.drain_s)
        failure: list[BaseException] = []
        loader = threading.Thread(target=self._load, args=(load, server, failure), name="loader")
        loader.start()
        try:
            with BoundedListener(self.listener.socket, self.limits.connections + REFUSED_AT_ONCE) as listening:
                server.run(sockets=[listening])
        finally:
            self.backend.drain()
            loader.join()
            self.listener.close()
            if (served := self.backend.served) is not None:
                served.close()
        if failure and not isinstance(failure[0], StoppedError):
            raise failure[0]

    def _config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self.app,
            http=cast(type[Protocol], partial(Connection, limits=self.limits)),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_MARGIN_S,
            h11_max_incomplete_event_size=self.limits.header_bytes,
            ssl_certfile=self.certificate,
            ssl_keyfile=self.key,
        )

    def _load(self, load: Load, server: _Server, failure: list[BaseException]) -> None:
        def report(done: int, total: int) -> None:
            if self.backend.draining:
                raise StoppedError
            self.backend.report_loading(done, total)

        try:
            self.backend.serve(load(report))
        except BaseException as error:
            failure.append(error)
            server.should_exit = True


class _Server(uvicorn.Server):
    """Drain on the first signal, and leave what comes after the end to the caller."""

    def __init__(self, config: uvicorn.Config, backend: Backend, drain_s: float) -> None:
        super().__init__(config)
        self._backend = backend
        self._drain_s = drain_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals while the server runs; uvicorn would raise them again at the end."""
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second time, end."""
        if self._backend.draining:
            self.should_exit = self.force_exit = True
            return
        self._backend.drain()
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        """Let the service end its requests, then let the server go; until then new requests get a 503."""
        log.info("draining: requests that run may end within %g s", self._drain_s)
        served = self._backend.served
        try:
            if served is not None and not served.service.drain(self._drain_s):
                log.warning("requests that did not end within %g s are cancelled", self._drain_s)
                served.service.close()
        finally:
            self.should_exit = True

"""A server in a process of its own, with the demo model or another, on a free port of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.cli.conftest import MAIN, ONE_THREAD
from tests.conftest import REPO

START_S = 300.0  # a busy machine takes its time to import torch


class ServerProcess:
    """Run `hybrid-k2 serve` with its log in a file."""

    def __init__(self, folder: Path, *arguments: str | Path, **variables: str) -> None:
        self.log = folder / "server.log"
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*MAIN, "serve", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment
                | {"PYTHONPATH": str(REPO), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
                | variables,
            )

    def said(self, pattern: str) -> re.Match[str]:
        """Wait until the log has a line like this."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            found = re.search(pattern, self.text(), re.MULTILINE)
            if found:
                return found
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)
        raise AssertionError(f"the server did not say {pattern}:\n{self.text()}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def url(self) -> str:
        return self.said(r"listening on (https?://\S+)")[1]

    def wait_ready(self) -> None:
        """Wait until requests are taken."""
        deadline = time.monotonic() + START_S
        url = self.url
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.text()
            if httpx.get(f"{url}/health", timeout=30).status_code == 200:
                return
            time.sleep(0.05)
        raise AssertionError(self.text())

    def ended(self) -> int:
        """Wait for the end, and return the exit code."""
        return self.process.wait(START_S)


@contextmanager
def serving(
    folder: Path, *arguments: str | Path, model: str | Path = "demo", **variables: str
) -> Iterator[ServerProcess]:
    """Run a server for the length of a block; ports and threads are such that many may run."""
    server = ServerProcess(folder, model, "--port", "0", *ONE_THREAD, *arguments, **variables)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()

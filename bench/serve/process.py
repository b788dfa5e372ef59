"""A server process to put load on, its memory and its figures."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from bench.serve.http import Exchange, get

START_S = 600.0
STOP_S = 120.0
RULES = """version: 1
devices: {{host: {{threads: {threads}}}}}
place:
  - {{what: embedding, on: host}}
  - {{what: attention, on: host}}
  - {{what: dense_mlp, on: host}}
  - {{what: shared_experts, on: host}}
  - {{what: routed_experts, on: host}}
  - {{what: lm_head, on: host}}
kv_cache: {{tokens: {tokens}}}
"""


class Server:
    """A server at an address; `pid`: its process, if it runs here."""

    def __init__(self, url: str, pid: int | None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            sys.exit(f"--url: expected http://HOST:PORT, got {url}")
        self.host, self.port, self.pid = parts.hostname, parts.port or 80, pid

    def exchange(self) -> Exchange:
        """Return a connection for one request."""
        return Exchange(self.host, self.port)

    async def get(self, path: str) -> tuple[int, bytes]:
        """Return the status and the body of a resource."""
        async with self.exchange() as exchange:
            await exchange.send(get(path))
            status, headers = await exchange.head()
            return status, await exchange.body(headers)

    async def figures(self) -> dict[str, float]:
        """Return what `/metrics` says, without labels and prefix."""
        _, text = await self.get("/metrics")
        found = re.findall(r"^hybrid_k2_(\w+) (\S+)$", text.decode(), re.MULTILINE)
        return {name: float(value) for name, value in found}

    def rss_bytes(self) -> int | None:
        """Return the resident memory of the process."""
        if self.pid is None:
            return None
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


class OwnServer(Server):
    """`hybrid-k2 serve` on a free port of this machine, with everything on the host and its log in a file."""

    def __init__(self, folder: Path, model: str, *, threads: str, kv_tokens: int, options: list[str]) -> None:
        rules = folder / "rules.yaml"
        rules.write_text(RULES.format(threads=threads, tokens=kv_tokens))
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "hybrid_k2", "serve", model, "--port", "0"),
                    *("--rules", str(rules), "--log-format", "json", *options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        super().__init__(self._listening(), self.process.pid)

    async def wait_ready(self) -> None:
        """Wait until requests are taken. Raises: RuntimeError: it answers something else."""
        deadline = time.monotonic() + START_S
        while (status := (await self.get("/health"))[0]) != 200:
            if status != 503:
                raise RuntimeError(f"/health: expected 200, or 503 while the model loads, got {status}")
            self._check_alive(deadline)
            await asyncio.sleep(0.1)

    def stop(self) -> int | None:
        """Ask the process to end, and return its exit code; None: it had to be killed."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def errors(self) -> list[str]:
        """Return the lines of the log that are errors, with their tracebacks."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith("{") and json.loads(line)["level"] in ("error", "critical"):
                found.append(line)
        return found

    def _listening(self) -> str:
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"listening on (\S+)", self.log.read_text(errors="replace"))):
            self._check_alive(deadline)
            time.sleep(0.05)
        return found[1]

    def _check_alive(self, deadline: float) -> None:
        if self.process.poll() is not None or time.monotonic() > deadline:
            self.process.kill()
            sys.exit(f"the server did not start:\n{self.log.read_text(errors='replace')}")

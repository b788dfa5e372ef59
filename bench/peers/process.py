"""A contender's process, seen from the comparison: asked one thing at a time, stopped while others are measured."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ANSWER_SECONDS = 300.0


class AbsentError(Exception):
    """Say why a contender is left out."""


class Contender:
    """Run `bench.peers.worker` on an interpreter that has the contender's package."""

    def __init__(self, name: str, python: str, folder: Path, *, timeout: float = ANSWER_SECONDS) -> None:
        """Start the process. Raises: AbsentError: the interpreter does not start."""
        self.name = name
        self.python = python
        self.timeout = timeout
        self.pending = b""
        self.log = (folder / f"{name}.log").open("wb+")
        command = [python, "-m", "bench.peers.worker", name, str(folder)]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, cwd=ROOT, bufsize=0
            )
        except OSError as error:
            self.log.close()
            raise AbsentError(f"{python} does not start: {error.strerror}") from error

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises: AbsentError: the process ended, failed, said something else, or took too long.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
        except BrokenPipeError:
            raise AbsentError(self._end()) from None
        line = self._line()
        try:
            answer = json.loads(line)
        except ValueError:
            raise AbsentError(f"expected an answer in JSON from {self.python}, got {line[:80]!r}") from None
        if not isinstance(answer, dict) or "error" in answer:
            raise AbsentError(f"{answer['error']} ({self.python})" if isinstance(answer, dict) else repr(answer))
        return answer

    def stop(self) -> None:
        """Keep its threads, which may spin while they wait, off the cores."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        end = time.monotonic() + self.timeout
        while b"\n" not in self.pending:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise AbsentError(f"no answer within {self.timeout:.0f} s")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                raise AbsentError(self._end())
            self.pending += part
        line, self.pending = self.pending.split(b"\n", 1)
        return line

    def _end(self) -> str:
        """Say how the process ended, with the last line that it wrote."""
        code = self.process.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        if code == -signal.SIGILL:
            how += ", its build does not support this CPU"
        return f"{self.python} {how}" + (f": {said[-1]}" if said else "")

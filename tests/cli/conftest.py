"""A checkpoint whose replies never end by themselves, and ways to run the command on it."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from tests.conftest import REPO
from tests.generators import read_tensors, write_checkpoint, write_tensors

ONE_THREAD = ["--rules", str(REPO / "tests" / "cli" / "one_thread.yaml")]
MAIN = [sys.executable, "-m", "hybrid_k2"]


@pytest.fixture(scope="session")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint; its special tokens have the logit 0, so with temperature 0 none is ever chosen."""
    folder = write_checkpoint(tmp_path_factory.mktemp("babbler"))
    tensors = read_tensors(folder)
    tensors["language_model.lm_head.weight"][-256:] = 0
    write_tensors(folder, tensors)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment that shares nothing with the user's: no history, no colours unless a test asks for them."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return kept | {
        "PYTHONPATH": str(REPO),
        "PYTHONWARNINGS": "error",
        "OMP_NUM_THREADS": "1",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "xterm-256color",
    }


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(environment: dict[str, str]) -> Callable[..., Done]:
    """Run `hybrid-k2` in a process of its own."""

    def run(*arguments: str | Path, stdin: bytes = b"", **variables: str) -> Done:
        done = subprocess.run(
            [*MAIN, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            env=environment | variables,
            check=False,
            timeout=120,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


class Pipes(subprocess.Popen[bytes]):
    """A running command with all its streams as pipes."""

    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., Pipes]]:
    """Start `hybrid-k2` and go on; it is ended with the test."""
    with ExitStack() as stack:

        def run(*arguments: str | Path) -> Pipes:
            pipe = subprocess.PIPE
            process = Pipes([*MAIN, *map(str, arguments)], stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """Run the entry point in this process, which has torch loaded already."""
    from hybrid_k2.cli.main import run

    def call_main(*arguments: str | Path, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else int(code is not None), out, err)

    logs = [logging.getLogger(name) for name in ("hybrid_k2", "hybrid_k2.server")]
    before = [([*log.handlers], log.level, log.propagate) for log in logs]
    yield call_main
    for log, (handlers, level, propagate) in zip(logs, before, strict=True):
        log.handlers[:] = handlers
        log.setLevel(level)
        log.propagate = propagate

"""The command with closed and full streams, as a shell makes them."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import MAIN, ONE_THREAD, Done

FULL = "error: standard output: cannot be written: No space left on device\n"
CLOSED = "error: standard output: expected an open stream, got a closed one\n"


def shell(environment: dict[str, str], arguments: list[str], streams: str) -> Done:
    line = f"{shlex.join([*MAIN, *arguments])} {streams}"
    null = subprocess.DEVNULL
    done = subprocess.run(
        ["sh", "-c", line], stdin=null, capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("arguments", [["--version"], ["chat", "--help"]])
@pytest.mark.parametrize(("streams", "said"), [(">/dev/full", FULL), (">&-", CLOSED), (">/dev/full 2>&-", "")])
def test_a_stdout_that_takes_nothing(
    environment: dict[str, str], arguments: list[str], streams: str, said: str
) -> None:
    if "/dev/full" in streams and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    assert shell(environment, arguments, streams) == Done(1, "", said)


def test_wrong_usage_without_stderr(environment: dict[str, str]) -> None:
    assert shell(environment, ["chat", "--no-such-option"], "2>&-") == Done(2, "", "")


def test_an_answer_without_stderr_and_stdin(environment: dict[str, str], babbler: Path) -> None:
    arguments = ["chat", str(babbler), *ONE_THREAD, "-p", "hello", "--json", "--temperature", "0", "--max-tokens", "5"]
    done = shell(environment, arguments, "2>&- <&-")
    assert done.code == 0
    assert json.loads(done.out)["usage"]["completion_tokens"] == 5


def test_an_answer_on_a_full_disk(environment: dict[str, str], babbler: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    arguments = ["chat", str(babbler), *ONE_THREAD, "-q", "--no-think", "--temperature", "0", "-p", "hello"]
    assert shell(environment, arguments, ">/dev/full") == Done(1, "", FULL)

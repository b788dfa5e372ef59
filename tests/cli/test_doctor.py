"""`hybrid-k2 doctor` as a command: lines or JSON, and an exit code that says whether something failed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import ONE_THREAD, Done, Pipes

Call = Callable[..., Done]
NAMES = ["software", "cpu", "kernels", "memory", "huge pages", "bandwidth", "K2.6", "gpu"]


def test_json_of_a_machine_that_works(call: Call, babbler: Path) -> None:
    done = call("doctor", babbler, *ONE_THREAD, "--json")
    assert done.code == 0, done.out
    report = json.loads(done.out)
    assert list(report) == ["version", "healthy", "findings"]
    assert report["healthy"] is True
    assert all(list(finding) == ["name", "status", "text", "hint"] for finding in report["findings"])
    names = [finding["name"] for finding in report["findings"]]
    assert names[: len(NAMES)] == NAMES
    assert names[-4:] == ["demo model", "checkpoint", "plan", "disk"]


def test_a_broken_checkpoint_is_a_failure_of_its_line(call: Call, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    done = call("doctor", tmp_path)
    assert done.code == 1
    assert done.err == ""
    lines = done.out.splitlines()
    (failed,) = (line for line in lines if line.startswith("FAILED"))
    assert failed.startswith("FAILED  checkpoint  ")
    assert any(line.startswith("ok      demo model  ") for line in lines)


@pytest.mark.parametrize("arguments", [("--rules", "host"), ("demo", "--rules", " "), ("demo", "more")])
def test_wrong_usage(call: Call, arguments: tuple[str, ...]) -> None:
    done = call("doctor", *arguments)
    assert (done.code, done.out) == (2, "")


def test_without_the_extras(environment: dict[str, str]) -> None:
    code = """
import sys
for name in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "PIL", "triton"):
    sys.modules[name] = None
sys.argv[:] = ["hybrid-k2", "doctor"]
from hybrid_k2.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning [serve]     " in done.stdout
    assert "pip install 'hybrid-k2[serve]'" in done.stdout
    assert "it says 42" in done.stdout


def test_ctrl_c_ends_it(start: Callable[..., Pipes]) -> None:
    process = start("doctor")
    assert process.stdout.readline().startswith(b"ok      software")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in err

"""Ctrl-C while modules are imported: the process ends at once with 130, whatever is being imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hybrid_k2.cli.interrupts import leaving_at_once

BENCH = [
    "bench",
    "experts",
    "--hidden",
    "32",
    "--intermediate",
    "32",
    "--experts",
    "8",
    "--tokens",
    "1",
    "--rounds",
    "1",
]
CHAT = ["chat", "--prompt", "hi", "--max-tokens", "1"]
# Ctrl-C comes when the module is looked for.
CHILD = """
import os, signal, sys

module, handler, *arguments = sys.argv[1:]

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
signal.signal(signal.SIGINT, signal.SIG_IGN if handler == "ignored" else signal.default_int_handler)
sys.argv[:] = ["hybrid-k2", *arguments]
from hybrid_k2.__main__ import main
main()
"""


def interrupt_at(module: str, arguments: list[str], handler: str = "default") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, module, handler, *arguments],
        check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("typer", CHAT),
        ("numpy", BENCH),
        ("numpy.exceptions", BENCH),
        ("numpy._core.overrides", CHAT),
        ("torch", BENCH),
        ("torch.nn", CHAT),
    ],
)
def test_imports_are_left_at_once(module: str, arguments: list[str]) -> None:
    done = interrupt_at(module, arguments)
    assert done.returncode == 130, done.stderr
    assert done.stderr == done.stdout == ""


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    done = interrupt_at("numpy.exceptions", ["bench", "experts", "--hidden", "33"], handler="ignored")
    assert done.returncode == 2  # wrong usage, as without Ctrl-C


def test_the_handler_of_before_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with leaving_at_once():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)

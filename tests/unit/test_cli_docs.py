"""docs/chat.md knows every option, command, exit code and JSON field."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from hybrid_k2.cli import exits
from hybrid_k2.cli.chat.commands import COMMANDS
from hybrid_k2.cli.log import LEVELS, VARIABLE
from tests.conftest import REPO

DOC = (REPO / "docs" / "chat.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def help_text() -> str:
    """The help as a user sees it, wide enough that no line is cut."""
    done = subprocess.run(
        [sys.executable, "-m", "hybrid_k2", "chat", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "PYTHONPATH": str(REPO), "COLUMNS": "200", "TERM": "dumb", "LANG": "C.UTF-8"},
    )
    assert done.stderr == ""
    return done.stdout


def test_every_option_is_documented(help_text: str) -> None:
    options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", help_text)) - {"-think"}
    assert {"--prompt", "-p", "--json", "--no-think", "--seed", "--repetition-penalty"} <= options
    missing = {option for option in options if f"`{option}`" not in DOC and f"`{option} " not in DOC}
    assert not missing


def test_no_option_is_made_up(help_text: str) -> None:
    documented = set(re.findall(r"`(--[a-z][a-z-]+)", DOC)) - {"--version"}
    assert not {option for option in documented if option not in help_text}


def test_every_command_is_documented() -> None:
    for command in COMMANDS:
        assert f"`/{command.name}" in DOC, command.name


def test_exit_codes_are_documented() -> None:
    for code in (exits.FAILED, exits.BUG, exits.INTERRUPTED, exits.PIPE_CLOSED):
        assert f"| {code} |" in DOC


def test_the_log_levels_are_documented() -> None:
    assert VARIABLE in DOC
    assert all(f"`{level}`" in DOC for level in LEVELS)

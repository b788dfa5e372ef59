"""The Makefile reads the extras of pyproject.toml by public packages, not by what a version of pip has inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPO


def required(extra: str) -> set[str]:
    """Say what an extra adds, by the package that is installed here."""
    found = map(Requirement, requires("hybrid-k2") or [])
    named = [one for one in found if one.marker is not None and one.marker.evaluate({"extra": extra})]
    return {f"{one.name}{one.specifier}" for one in named}


@pytest.mark.parametrize("extra", ["test", "check", "gpu"])
def test_the_requirements_of_an_extra_need_no_pip(extra: str, tmp_path: Path) -> None:
    try:
        expected = required(extra)
    except PackageNotFoundError:
        pytest.skip("hybrid-k2 is not installed here")
    if shutil.which("make") is None or not (Path(sys.prefix) / "bin" / "python").exists():
        pytest.skip("no make, or no virtual environment")
    (tmp_path / "pip.py").write_text("raise ImportError('pip is for installing')\n")
    show = f"show: ; @echo $$($(call requirements,{extra}))"
    done = subprocess.run(
        ["make", "--no-print-directory", f"--eval={show}", "show", f"VENV={sys.prefix}"],
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == expected != set()

"""The Python examples of the documentation run, from top to bottom, on the demo checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from hybrid_k2.engine import Engine, Reply, SamplingParams, Timings, Usage
from tests.conftest import REPO

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ["README.md", "docs/python-api.md", "docs/structured-output.md", "docs/serving-engine.md"]


@pytest.fixture
def one_core() -> Iterator[None]:
    """Let engines plan for one core: models as small as the demo are no faster with more."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def blocks(page: str) -> list[tuple[int, str]]:
    """Return the blocks of a page with the lines that they start on."""
    text = (REPO / page).read_text()
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "Grammar." in (REPO / page).read_text():
        pytest.importorskip("llguidance", reason="llguidance is not installed")
    names: dict[str, Any] = {"__name__": "example"}
    examples = blocks(page)
    assert examples, f"{page}: no python block found"
    for line, code in examples:
        # Blank lines before the code make a traceback name the line of the page.
        exec(compile("\n" * line + code, str(Path(page)), "exec"), names)
    assert capsys.readouterr().out.strip()


def test_the_page_names_every_argument_of_the_api() -> None:
    text = (REPO / "docs" / "python-api.md").read_text()
    for method in (Engine.load, Engine.generate, Engine.chat):
        (shown,) = re.findall(rf"`(?:E|e)ngine\.{method.__name__}\(([^`]*)\)", text)[:1]
        documented = [part.split("=")[0].strip() for part in shown.split(",") if part.strip() != "*"]
        assert documented == [name for name in signature(method).parameters if name != "self"]
    for record in (SamplingParams, Reply, Usage, Timings):
        for field in fields(record):
            assert f"`{field.name}`" in text, f"docs/python-api.md: {record.__name__}.{field.name} is not described"

"""docs/performance.md knows every option of `bench experts` and every field of its JSON."""

from __future__ import annotations

import re
from dataclasses import fields

from typer.main import get_command

from hybrid_k2.bench.experts import ExpertsReport, ExpertsResult
from hybrid_k2.cli.bench import app
from tests.conftest import REPO

DOC = (REPO / "docs" / "performance.md").read_text(encoding="utf-8").split("\n## ")[0]


def test_every_option_is_documented_and_none_is_made_up() -> None:
    command = get_command(app).commands["experts"]  # type: ignore[attr-defined]
    options = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    assert set(re.findall(r"(?<=`)--[a-z-]+", DOC)) == options - {"--help"}


def test_every_field_is_documented() -> None:
    names = {field.name for kind in (ExpertsReport, ExpertsResult) for field in fields(kind)} - {"results"}
    described = {"numerics", "isa", "threads"}  # said by the options
    assert not {name for name in names - described if f"`{name}`" not in DOC}

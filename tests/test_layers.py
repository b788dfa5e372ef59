"""The house rule that imports point down, and that the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

# From top to bottom; packages on one line do not import each other.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"server"},
    {"bench"},
    {"engine"},
    {"model"},
    {"accelerator"},
    {"dense", "experts", "placement", "protocol", "demo"},
    {"checkpoint"},
    {"config", "native"},
    {"vision_config"},
    {"fields", "files", "host"},
    {"errors"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PACKAGE = REPO / "hybrid_k2"


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("hybrid_k2.")}
    return parts & RANK.keys()


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    assert part in RANK, f"{part} has no layer: add it to LAYERS and to docs/architecture.md"
    for other in imported_parts(path) - {part}:
        assert RANK[part] < RANK[other], f"{path.relative_to(REPO)} ({part}) must not import {other}"


@pytest.mark.parametrize(
    "module",
    [
        "hybrid_k2",
        "hybrid_k2.cli.main",
        "hybrid_k2.cli.chat.session",
        "hybrid_k2.cli.remote.backend",
        "hybrid_k2.placement",
        "hybrid_k2.protocol",
    ],
)
def test_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, f"{module} imports torch"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_one_module_imports_the_extension(path: Path) -> None:
    if path != PACKAGE / "native.py":
        code = path.read_text().replace("`hybrid_k2._native`", "")
        assert "import _native" not in code, "go through hybrid_k2.native"
        assert "hybrid_k2._native" not in code, "go through hybrid_k2.native"

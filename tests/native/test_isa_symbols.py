"""A file compiled for one instruction set must not lend its code to files compiled for the baseline."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPO
from tests.native.conftest import CSRC, Compiler

KERNEL_FILES = sorted(path.relative_to(CSRC).as_posix() for path in (CSRC / "kernels").glob("*/*.cpp"))
# What begins a file's name, and what its tables are called: for experts the form of the activations and the numerics.
TABLES = {
    "a16": {"exact", "bf16"},
    "a8": {"fast"},
    "bf16": {"bf16"},
    "attention": {"attention_table"},
    "tiles": {"exact", "bf16"},
    "dense": {"dense_table"},
    "pack": {"pack_table"},
}


def symbols(path: Path) -> list[tuple[str, str]]:
    """The (kind, name) of each defined symbol."""
    listing = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    return [(kind, name) for _, kind, name in (line.split(" ", 2) for line in listing.splitlines())]


@pytest.mark.parametrize("source", KERNEL_FILES)
def test_a_kernel_file_exports_its_tables_and_nothing_else(
    source: str, x86_compiler: Compiler, build_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    # Unoptimised, every inline function that is used has a symbol: the strictest view.
    flags = [flag for flag in build_script.flags(source) if not flag.startswith("-O")]
    found = symbols(x86_compiler.object(source, *flags, "-O0"))
    isa, form = Path(source).parent.name, Path(source).name.split("_")[0]
    assert [name for kind, name in found if kind in "WVvwu"] == []
    assert {name for kind, name in found if kind.isupper()} == {f"k2::{isa}::{name}" for name in TABLES[form]}


def test_the_check_sees_a_weak_symbol(compiler: Compiler) -> None:
    source = compiler.folder / "weak.cpp"
    source.write_text("inline int shared(int x) { return x + 1; }\nint use(int x) { return shared(x); }\n")
    target = compiler.folder / "weak.o"
    compiler.run(["-O0", "-c", str(source), "-o", str(target)])
    assert ("W", "shared(int)") in symbols(target)

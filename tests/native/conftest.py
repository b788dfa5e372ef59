"""Compile the native tests: C++ programs from csrc/testing with the sources that they exercise."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPO

CSRC = REPO / "csrc"
BASE_FLAGS = (
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-pthread",
    f"-I{CSRC}",
)
CORE_SOURCES = tuple(f"core/{name}.cpp" for name in ("huge_buffer", "page_count"))
# Those that bring weights into layout L32, with a packer for every CPU.
PACKER_SOURCES = (
    *(f"moe/{name}.cpp" for name in ("l32_pack", "l32_digest")),
    *(f"kernels/{name}.cpp" for name in ("isa_list", "pack_list")),
    "kernels/portable/pack_portable.cpp",
    "cpu/features.cpp",
)
MOE_SOURCES = (
    *(f"moe/{name}.cpp" for name in ("expert_layer", "layer", "moe_job", "moe_part", "routing", "slots")),
    *PACKER_SOURCES,
    *(f"cpu/{name}.cpp" for name in ("thread_pool", "first_touch", "affinity")),
    *CORE_SOURCES,
    "runtime/runtime.cpp",
    "kernels/kernel_list.cpp",
)


class Compiler:
    """Compile files once per test session, in parallel, into a folder of their own."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command = command
        self.folder = folder

    def run(self, arguments: Iterable[str]) -> None:
        """Run the compiler and show what it said if it fails."""
        result = subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    def object(self, source: str, *flags: str) -> Path:
        """Compile one file under csrc with these flags and the base flags."""
        target = self.folder / f"{source.replace('/', '_')}{abs(hash(flags))}.o"
        if not target.exists():
            self.run([*BASE_FLAGS, *flags, "-c", str(CSRC / source), "-o", str(target)])
        return target

    def objects(self, sources: Sequence[str], *flags: str) -> list[Path]:
        """Compile several files alike."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda source: self.object(source, *flags), sources))

    def program(self, name: str, objects: Iterable[Path], *flags: str) -> Path:
        """Link a program."""
        target = self.folder / name
        self.run([*flags, "-pthread", *map(str, objects), "-o", str(target)])
        return target


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """The C++ compiler: CXX, or g++; skips where it is missing."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return Compiler(command, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def x86_compiler(compiler: Compiler) -> Compiler:
    """The C++ compiler on a machine that it builds the x86 kernels for."""
    if platform.machine() != "x86_64":
        pytest.skip("the instruction-set kernels are for x86-64")
    return compiler


@pytest.fixture(scope="session")
def build_script() -> ModuleType:
    """setup.py as a module: the flags that the package is built with."""
    spec = importlib.util.spec_from_file_location("hybrid_k2_setup", REPO / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_program(program: Path | str, *arguments: str, limit_s: float = 120) -> str:
    """Run a test program; what it printed is shown if it fails."""
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=limit_s)
    assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
    return result.stdout


def require_sanitizer(compiler: Compiler, name: str) -> None:
    """Skip unless programs with this sanitizer can be linked and started here."""
    source = compiler.folder / "empty.cpp"
    source.write_text("int main() {}\n")
    program = compiler.folder / f"empty_{name.replace(',', '_')}"
    linked = subprocess.run(
        [*compiler.command, f"-fsanitize={name}", source, "-o", program], capture_output=True, check=False
    )
    if linked.returncode != 0 or subprocess.run([program], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"-fsanitize={name} does not work here")

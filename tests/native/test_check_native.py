"""Every native test program under the sanitizers and valgrind, on a library that is built the same way.

These builds take minutes: `make check-native` runs them, and a plain run of the tests leaves them out.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from hybrid_k2.experts import IsaFact, isa_facts
from tests.native.conftest import CSRC, Compiler, require_sanitizer, run_program

TOOLS = {
    "address,undefined": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
    "valgrind": (),
}
VALGRIND = ("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", "--fair-sched=yes")
LIMIT_S = 900
CASES = "12"

Calls = list[tuple[tuple[str, ...], str]]  # arguments, and what is printed
Program = Callable[[Path, list[IsaFact]], Calls]


def seed() -> str:
    """Draw a seed; a failing run shows it."""
    return str(random.SystemRandom().randrange(2**63))


def once(*arguments: str) -> Program:
    """Call a program with these arguments."""
    return lambda folder, isas: [(arguments, "ok\n")]


def comparison(arguments: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """Compare two tables on a few random cases."""
    return (*arguments, seed(), CASES), f"{CASES} cases are equal\n"


# How each program of csrc/testing is called, given an empty folder and the instruction sets beside the portable one.
PROGRAMS: dict[str, Program] = {
    "amx_model_test": once(),
    "attention_job_test": once(seed(), "2"),
    "compare_attention": lambda folder, isas: [
        comparison(("portable", isa.name)) for isa in isas if isa.name in ("avx2", "avx512_vnni")
    ],
    "compare_dense": lambda folder, isas: [
        comparison(("portable", isa.name)) for isa in isas if isa.name in ("avx2", "avx512_vnni")
    ],
    "compare_tables": lambda folder, isas: [
        comparison((numerics, "portable", isa.name)) for isa in isas for numerics in isa.numerics
    ],
    "dense_job_test": once(),
    "expert_reader_test": lambda folder, isas: [((str(folder), seed()), "ok\n")],
    "features_test": once(),
    "handoff_test": once(seed(), "300", "under-a-tool"),
    "l32_pack_test": lambda folder, isas: [
        ((seed(), isa), "ok\n") for isa in ("portable", *(isa.name for isa in isas if isa.name == "avx512_vnni"))
    ],
    "memory_test": once(),
    "layer_step_test": once(seed()),
    "moe_job_test": once("under-a-tool"),
    "rows_test": once(seed()),
    "thread_pool_test": once("under-a-tool"),  # leaves out what the tools cannot follow
    "unit_queue_test": once(),
}


def test_every_program_is_checked() -> None:
    assert sorted(PROGRAMS) == sorted(path.stem for path in (CSRC / "testing").glob("*.cpp"))


def usable_isas() -> list[IsaFact]:
    """The instruction sets beside the portable one that are built and run here."""
    usable = [fact for fact in isa_facts() if fact.built and fact.supported and fact.name != "portable"]
    return usable if platform.machine() == "x86_64" else []


@pytest.fixture(scope="module")
def library(compiler: Compiler, build_script: ModuleType) -> Callable[[str], list[Path]]:
    """Compile all that the extension consists of, but for its bindings, once for each tool."""
    isas = [fact.name for fact in usable_isas()]
    names = [path.relative_to(CSRC) for path in sorted(CSRC.glob("*/**/*.cpp")) if "testing" not in path.parts]
    kept = [name for name in names if name.parts[0] != "kernels" or set(name.parts[1:-1]) <= {"portable", *isas}]
    built: dict[str, list[Path]] = {}

    def compile_one(name: Path, tool: str) -> Path:
        own = [flag for flag in build_script.flags(f"csrc/{name}") if flag.startswith(("-m", "-Wno-"))]
        defines = [f"-DK2_BUILT_{isa.upper()}" for isa in isas]
        return compiler.object(str(name), "-O1", "-g1", *TOOLS[tool], *defines, *own)

    def build(tool: str) -> list[Path]:
        if tool not in built:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                built[tool] = list(pool.map(lambda name: compile_one(name, tool), kept))
        return built[tool]

    return build


@pytest.mark.check_native
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_clean(
    name: str, tool: str, compiler: Compiler, library: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    if tool == "valgrind":
        if shutil.which(tool) is None:
            pytest.skip("valgrind is not installed")
    else:
        require_sanitizer(compiler, tool)
    main = compiler.object(f"testing/{name}.cpp", "-O1", "-g1", *TOOLS[tool])
    program = compiler.program(f"{name}_{tool}", [main, *library(tool)], *TOOLS[tool])
    command = (*VALGRIND, str(program)) if tool == "valgrind" else (str(program),)
    # valgrind emulates a CPU without AVX-512 and AMX; the sanitizers run those on the real one.
    isas = [isa for isa in usable_isas() if tool != "valgrind" or isa.name == "avx2"]
    for arguments, output in PROGRAMS[name](tmp_path, isas):
        assert run_program(*command, *arguments, limit_s=LIMIT_S) == output, arguments


@pytest.mark.check_native
@pytest.mark.parametrize(
    ("tool", "body", "said"),
    [
        ("address,undefined", "int* p = new int[2]; return p[argc + 1];", "heap-buffer-overflow"),
        ("address,undefined", "int n = 2147483647; return n + argc > 0;", "signed integer overflow"),
        ("thread", "int n = 0; std::thread t([&] { ++n; }); ++n; t.join(); return n - 2;", "data race"),
        ("valgrind", "int* p = new int[2]; return p[argc + 1] > 7;", "Invalid read"),
        ("valgrind", 'int* p = new int[2]; return p[0] > argc ? 0 : 0 * printf("x");', "uninitialised"),
    ],
)
def test_a_tool_notices(tool: str, body: str, said: str, compiler: Compiler) -> None:
    if tool == "valgrind" and shutil.which(tool) is None:
        pytest.skip("valgrind is not installed")
    if tool != "valgrind":
        require_sanitizer(compiler, tool)
    source = compiler.folder / "faulty.cpp"
    source.write_text(f"#include <cstdio>\n#include <thread>\nint main(int argc, char**) {{ {body} }}\n")
    program = compiler.folder / "faulty"
    compiler.run(["-std=c++20", "-O0", "-g1", "-pthread", *TOOLS[tool], str(source), "-o", str(program)])
    command = (*VALGRIND, str(program)) if tool == "valgrind" else (str(program),)
    with pytest.raises(AssertionError, match=said):
        run_program(*command)

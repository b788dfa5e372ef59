"""AVX-512 BF16 and AMX give the bits of the portable kernels, on models of their instructions and on CPUs with them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPO
from tests.native.conftest import CSRC, Compiler, run_program
from tests.native.test_kernel_tables import compare, compare_program, supported

MODEL = f"-I{CSRC / 'testing' / 'avx512_model'}"  # its immintrin.h stands before the compiler's
AMX_MODEL = CSRC / "testing" / "amx_model" / "amx.h"
FILES = {
    "avx512_bf16": "kernels/avx512_bf16/bf16_avx512_bf16.cpp",
    "amx_bf16": "kernels/amx_bf16/tiles_amx_bf16.cpp",
}
NUMERICS = {"avx512_bf16": ["bf16"], "amx_bf16": ["exact", "bf16"]}
ISAS = tuple(FILES)


def changed_amx_model(compiler: Compiler, name: str, old: str, new: str) -> str:
    """Write a copy of the tile model with one change; returns the flag that puts it before the model."""
    text = AMX_MODEL.read_text()
    assert old in text
    folder = compiler.folder / name / "testing" / "amx_model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "amx.h").write_text(text.replace(old, new))
    return f"-iquote{compiler.folder / name}"  # searched before every -I


@pytest.fixture
def real_flags(build_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The flags that the package is built with, for each of the instruction sets."""
    monkeypatch.chdir(REPO)
    return {isa: build_script.flags(f"csrc/{FILES[isa]}") for isa in ISAS}


def test_the_model_of_the_tile_instructions_follows_the_manual(compiler: Compiler) -> None:
    objects = compiler.objects(["testing/amx_model_test.cpp"], "-O1")
    assert run_program(compiler.program("amx_model_test", objects)) == "ok\n"


@pytest.mark.parametrize("isa", ISAS)
def test_the_model_gives_the_bits_of_portable(isa: str, x86_compiler: Compiler) -> None:
    program = compare_program(x86_compiler, isa, x86_compiler.object(FILES[isa], "-O0", MODEL))
    compare(program, isa, 60, NUMERICS[isa])


@pytest.mark.parametrize("isa", ISAS)
def test_the_cpu_gives_the_bits_of_portable(isa: str, x86_compiler: Compiler, real_flags: dict[str, list[str]]) -> None:
    if not supported(isa):
        pytest.skip(f"this CPU has no {isa}; the model stands in")
    program = compare_program(x86_compiler, isa, x86_compiler.object(FILES[isa], *real_flags[isa]))
    compare(program, isa, 200, NUMERICS[isa])


def test_the_bits_do_not_depend_on_the_order_of_a_tiles_sums(x86_compiler: Compiler) -> None:
    one_chain = changed_amx_model(x86_compiler, "one_chain", "chain[odd]", "chain[0]")
    program = compare_program(x86_compiler, "amx_bf16", x86_compiler.object(FILES["amx_bf16"], "-O0", one_chain, MODEL))
    compare(program, "amx_bf16", 30, NUMERICS["amx_bf16"])


def test_the_comparison_notices_a_wrong_tile_instruction(x86_compiler: Compiler) -> None:
    no_odd = changed_amx_model(x86_compiler, "no_odd", "chain[0] + chain[1]", "chain[0]")
    program = compare_program(x86_compiler, "amx_bf16", x86_compiler.object(FILES["amx_bf16"], "-O0", no_odd, MODEL))
    with pytest.raises(AssertionError, match="expected"):
        compare(program, "amx_bf16", 30, NUMERICS["amx_bf16"])


def disassemble(path: Path) -> list[str]:
    """The mnemonics of an object file, in order."""
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split("\t")[1].split()[0] for line in listing.splitlines() if line.count("\t") == 1]


def test_the_compiler_emits_the_real_instructions(x86_compiler: Compiler, real_flags: dict[str, list[str]]) -> None:
    vectors, tiles = (disassemble(x86_compiler.object(FILES[isa], *real_flags[isa])) for isa in ISAS)
    assert "vdpbf16ps" in vectors
    assert not [name for name in vectors if name.startswith(("t", "ldt")) and not name.startswith("test")]
    for name in ("tdpbf16ps", "tileloadd", "tilestored", "tilezero", "ldtilecfg"):
        assert name in tiles
    assert tiles.count("tilerelease") == tiles.count("ldtilecfg")  # each call gives the registers back


def test_the_permission_for_amx_is_asked_for(compiler: Compiler) -> None:
    objects = compiler.objects(["testing/features_test.cpp", "cpu/features.cpp"], "-O1")
    assert run_program(compiler.program("features_test", objects)) == "ok\n"

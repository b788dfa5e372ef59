"""Every instruction set gives the same bits as the portable kernels, also one that this CPU lacks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from hybrid_k2.experts import isa_facts
from tests.native.conftest import CSRC, Compiler, run_program

NUMERICS = ("exact", "fast", "bf16")
FORMS = ("a16", "a8")  # of the activations: what the files are named after
LIST_SOURCES = (
    "testing/compare_tables.cpp",
    *(f"kernels/{name}.cpp" for name in ("isa_list", "kernel_list")),
    "cpu/features.cpp",
    "core/huge_buffer.cpp",
)
AVX2 = ("-mavx2", "-mfma")
AVX512_VNNI = (
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512vnni",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)


def supported(isa: str) -> bool:
    """Whether this CPU runs the instruction set."""
    return any(fact.name == isa and fact.supported for fact in isa_facts())


def kernel_files(compiler: Compiler, isa: str, *flags: str) -> list[Path]:
    """Compile an instruction set's files, one for each of the numerics."""
    return compiler.objects([f"kernels/{isa}/{form}_{isa}.cpp" for form in FORMS], *flags)


def compare_program(compiler: Compiler, isa: str, *kernels: Path) -> Path:
    """Link the comparison of one instruction set's kernel files with the portable ones."""
    objects = compiler.objects(LIST_SOURCES, "-O1", f"-DK2_BUILT_{isa.upper()}")
    portable = kernel_files(compiler, "portable", "-O1")
    return compiler.program(f"compare_{isa}_{kernels[0].stem}", [*objects, *portable, *kernels])


def compare(program: Path, isa: str, cases: int, numerics: Sequence[str] = NUMERICS) -> None:
    """Run it with fresh random work for each of the numerics."""
    for name in numerics:
        seed = random.SystemRandom().randrange(2**63)
        output = run_program(program, name, "portable", isa, str(seed), str(cases))
        assert output == f"{cases} cases are equal\n", f"{name}, seed {seed}"


def test_avx2_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    if not supported("avx2"):
        pytest.skip("this CPU has no AVX2")
    kernels = kernel_files(x86_compiler, "avx2", "-O2", *AVX2)
    compare(compare_program(x86_compiler, "avx2", *kernels), "avx2", 200)


def test_avx512_vnni_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    if not supported("avx512_vnni"):
        pytest.skip("this CPU has no AVX-512 VNNI; the model below stands in")
    kernels = kernel_files(x86_compiler, "avx512_vnni", "-O2", *AVX512_VNNI)
    compare(compare_program(x86_compiler, "avx512_vnni", *kernels), "avx512_vnni", 200)


def test_avx512_vnni_on_a_model_of_its_instructions_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    model = f"-I{CSRC / 'testing' / 'avx512_model'}"  # its immintrin.h stands before the compiler's
    kernels = kernel_files(x86_compiler, "avx512_vnni", "-O0", model)
    compare(compare_program(x86_compiler, "avx512_vnni", *kernels), "avx512_vnni", 60)


def test_the_comparison_notices_one_wrong_instruction(x86_compiler: Compiler) -> None:
    broken = x86_compiler.folder / "broken_model"
    broken.mkdir(exist_ok=True)
    text = (CSRC / "testing" / "avx512_model" / "immintrin.h").read_text()
    fused, unfused = "std::fma(a.v[i], b.v[i], c.v[i])", "a.v[i] * b.v[i] + c.v[i]"
    assert fused in text
    (broken / "immintrin.h").write_text(text.replace(fused, unfused))
    kernels = kernel_files(x86_compiler, "avx512_vnni", "-O0", f"-I{broken}")
    program = compare_program(x86_compiler, "avx512_vnni", *kernels)
    with pytest.raises(AssertionError, match="expected"):
        compare(program, "avx512_vnni", 60)

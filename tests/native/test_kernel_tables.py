"""Every instruction set gives the same bits as the portable kernels, also one that this CPU lacks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hybrid_k2.experts import isa_facts
from tests.native.conftest import CSRC, Compiler, run_program

LIST_SOURCES = ("testing/compare_tables.cpp", "kernels/kernel_list.cpp", "cpu/features.cpp", "core/huge_buffer.cpp")
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


def compare_program(compiler: Compiler, isa: str, kernel: Path) -> Path:
    """Link the comparison of one instruction set's kernel file with the portable one."""
    objects = compiler.objects(LIST_SOURCES, "-O1", f"-DK2_BUILT_{isa.upper()}")
    portable = compiler.object("kernels/portable/a16_portable.cpp", "-O1")
    return compiler.program(f"compare_{isa}_{kernel.stem}", [*objects, portable, kernel])


def compare(program: Path, isa: str, cases: int) -> None:
    """Run it with fresh random work."""
    seed = random.SystemRandom().randrange(2**63)
    output = run_program(program, "portable", isa, str(seed), str(cases))
    assert output == f"{cases} cases are equal\n", f"seed {seed}"


def test_avx2_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    if not supported("avx2"):
        pytest.skip("this CPU has no AVX2")
    kernel = x86_compiler.object("kernels/avx2/a16_avx2.cpp", "-O2", *AVX2)
    compare(compare_program(x86_compiler, "avx2", kernel), "avx2", 200)


def test_avx512_vnni_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    if not supported("avx512_vnni"):
        pytest.skip("this CPU has no AVX-512 VNNI; the model below stands in")
    kernel = x86_compiler.object("kernels/avx512_vnni/a16_avx512_vnni.cpp", "-O2", *AVX512_VNNI)
    compare(compare_program(x86_compiler, "avx512_vnni", kernel), "avx512_vnni", 200)


def test_avx512_vnni_on_a_model_of_its_instructions_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    model = f"-I{CSRC / 'testing' / 'avx512_model'}"  # its immintrin.h stands before the compiler's
    kernel = x86_compiler.object("kernels/avx512_vnni/a16_avx512_vnni.cpp", "-O0", model)
    compare(compare_program(x86_compiler, "avx512_vnni", kernel), "avx512_vnni", 60)


def test_the_comparison_notices_one_wrong_instruction(x86_compiler: Compiler) -> None:
    broken = x86_compiler.folder / "broken_model"
    broken.mkdir(exist_ok=True)
    text = (CSRC / "testing" / "avx512_model" / "immintrin.h").read_text()
    fused, unfused = "std::fma(a.v[i], b.v[i], c.v[i])", "a.v[i] * b.v[i] + c.v[i]"
    assert fused in text
    (broken / "immintrin.h").write_text(text.replace(fused, unfused))
    kernel = x86_compiler.object("kernels/avx512_vnni/a16_avx512_vnni.cpp", "-O0", f"-I{broken}")
    program = compare_program(x86_compiler, "avx512_vnni", kernel)
    with pytest.raises(AssertionError, match="expected"):
        compare(program, "avx512_vnni", 60)

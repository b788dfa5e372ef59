"""Attention over cached latents: right, and the same bits in any company and on every instruction set."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.native.conftest import CSRC, Compiler, require_sanitizer, run_program
from tests.native.test_kernel_tables import AVX2, AVX512_VNNI, supported

SOURCES = (
    "attention/attention_plan.cpp",
    "attention/attention_job.cpp",
    "attention/latent_pages.cpp",
    "cpu/thread_pool.cpp",
    "cpu/affinity.cpp",
    "core/huge_buffer.cpp",
    "cpu/features.cpp",
    *(f"kernels/{name}.cpp" for name in ("isa_list", "attention_list")),
)
PORTABLE = "kernels/portable/attention_portable.cpp"


def seed() -> str:
    """Draw a seed; it is among the arguments that a failing program's call shows."""
    return str(random.SystemRandom().randrange(2**63))


def test_attention_job(compiler: Compiler) -> None:
    objects = compiler.objects(("testing/attention_job_test.cpp", *SOURCES), "-O1")
    program = compiler.program("attention_job_test", [*objects, compiler.object(PORTABLE, "-O2")])
    assert run_program(program, seed(), "20") == "ok\n"


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_attention_job_under_sanitizers(sanitizer: str, compiler: Compiler) -> None:
    require_sanitizer(compiler, sanitizer)
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    objects = compiler.objects(("testing/attention_job_test.cpp", *SOURCES), "-O1", "-g1", *flags)
    program = compiler.program(
        f"attention_job_test_{sanitizer[:6]}", [*objects, compiler.object(PORTABLE, "-O1", *flags)], *flags
    )
    assert run_program(program, seed(), "3") == "ok\n"


def compare(compiler: Compiler, isa: str, kernel: Path, cases: int) -> None:
    """Compare a kernel file with the portable one on fresh random calls."""
    objects = compiler.objects(("testing/compare_attention.cpp", *SOURCES), "-O1", f"-DK2_BUILT_{isa.upper()}")
    portable = compiler.object(PORTABLE, "-O2")
    program = compiler.program(f"compare_attention_{isa}_{kernel.stem}", [*objects, portable, kernel])
    assert run_program(program, "portable", isa, seed(), str(cases)) == f"{cases} cases are equal\n"


def test_avx2_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    if not supported("avx2"):
        pytest.skip("this CPU has no AVX2")
    compare(x86_compiler, "avx2", x86_compiler.object("kernels/avx2/attention_avx2.cpp", "-O2", *AVX2), 60)


def test_avx512_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    if not supported("avx512_vnni"):
        pytest.skip("this CPU has no AVX-512 VNNI; the model below stands in")
    kernel = x86_compiler.object("kernels/avx512_vnni/attention_avx512_vnni.cpp", "-O2", *AVX512_VNNI)
    compare(x86_compiler, "avx512_vnni", kernel, 60)


def test_avx512_on_a_model_of_its_instructions_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    model = f"-I{CSRC / 'testing' / 'avx512_model'}"  # its immintrin.h stands before the compiler's
    kernel = x86_compiler.object("kernels/avx512_vnni/attention_avx512_vnni.cpp", "-O1", model)
    compare(x86_compiler, "avx512_vnni", kernel, 15)


def test_the_comparison_notices_one_wrong_instruction(x86_compiler: Compiler) -> None:
    broken = x86_compiler.folder / "broken_attention_model"
    broken.mkdir(exist_ok=True)
    text = (CSRC / "testing" / "avx512_model" / "immintrin.h").read_text()
    right, wrong = "a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }\n\n// Conversions", "a.v[i]); }\n\n// Conversions"
    assert right in text
    (broken / "immintrin.h").write_text(text.replace(right, wrong))
    kernel = x86_compiler.object("kernels/avx512_vnni/attention_avx512_vnni.cpp", "-O1", f"-I{broken}")
    with pytest.raises(AssertionError, match="expected"):
        compare(x86_compiler, "avx512_vnni", kernel, 20)

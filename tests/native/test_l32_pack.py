"""Packing in pieces, checksums and refusals under the sanitizers, and the packer of each instruction set."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.native.conftest import CORE_SOURCES, CSRC, PACKER_SOURCES, Compiler, require_sanitizer, run_program
from tests.native.test_kernel_tables import AVX512_VNNI, supported

SOURCES = ("testing/l32_pack_test.cpp", "moe/expert_layer.cpp", *PACKER_SOURCES, *CORE_SOURCES)
AVX512_PACKER = "kernels/avx512_vnni/pack_avx512_vnni.cpp"
MODEL = CSRC / "testing" / "avx512_model"


def test_l32_pack(compiler: Compiler) -> None:
    sanitizer = "address,undefined"
    require_sanitizer(compiler, sanitizer)
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    program = compiler.program("l32_pack_test", compiler.objects(SOURCES, "-O1", "-g1", *flags), *flags)
    seed = random.SystemRandom().randrange(2**63)
    assert run_program(program, str(seed)) == "ok\n", f"seed {seed}"


def check_avx512(compiler: Compiler, name: str, packer: Path) -> None:
    """Run the test on this build of the AVX-512 packer, whose CPU is not asked for."""
    objects = compiler.objects(SOURCES, "-O1", "-DK2_BUILT_AVX512_VNNI")
    program = compiler.program(f"l32_pack_{name}", [*objects, packer])
    seed = random.SystemRandom().randrange(2**63)
    assert run_program(program, str(seed), "avx512_vnni") == "ok\n", f"seed {seed}"


def test_avx512_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    if not supported("avx512_vnni"):
        pytest.skip("this CPU has no AVX-512 VNNI; the model below stands in")
    check_avx512(x86_compiler, "avx512", x86_compiler.object(AVX512_PACKER, "-O2", *AVX512_VNNI))


def test_avx512_on_a_model_of_its_instructions_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    check_avx512(x86_compiler, "model", x86_compiler.object(AVX512_PACKER, "-O0", f"-I{MODEL}"))


@pytest.mark.parametrize(
    ("before", "after"),
    [("a >= b", "a > b"), ("x : y, at)", "x : y, i)"), ("x - y", "x + y")],
)
def test_the_comparison_notices_one_wrong_instruction(before: str, after: str, x86_compiler: Compiler) -> None:
    broken = x86_compiler.folder / f"broken_pack_model_{abs(hash(before))}"
    broken.mkdir(exist_ok=True)
    text = (MODEL / "pack.h").read_text()
    assert before in text
    line = '#include "testing/avx512_model/pack.h"\n'
    model = (MODEL / "immintrin.h").read_text()
    assert line in model
    (broken / "immintrin.h").write_text(model.replace(line, text.replace(before, after)))
    packer = x86_compiler.object(AVX512_PACKER, "-O0", f"-I{broken}")
    with pytest.raises(AssertionError, match="expected"):
        check_avx512(x86_compiler, f"broken_{abs(hash(before))}", packer)

"""The dense kernels of every instruction set give the bits of the portable ones, also of one that this CPU lacks."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.conftest import CORE_SOURCES, CSRC, Compiler, require_sanitizer, run_program
from tests.native.test_kernel_tables import AVX2, AVX512_VNNI, supported

KERNEL_LISTS = tuple(f"kernels/{name}.cpp" for name in ("isa_list", "dense_list"))
LIST_SOURCES = ("testing/compare_dense.cpp", *KERNEL_LISTS, "cpu/features.cpp", *CORE_SOURCES)
JOB_SOURCES = (
    "testing/dense_job_test.cpp",
    *(f"dense/{name}.cpp" for name in ("dense_job", "dense_matrix")),
    *(f"cpu/{name}.cpp" for name in ("thread_pool", "first_touch", "affinity", "features")),
    *CORE_SOURCES,
    *KERNEL_LISTS,
)


def compare(compiler: Compiler, isa: str, kernel: Path, cases: int) -> None:
    """Link the comparison of one instruction set's kernel file with the portable one, and run it on fresh work."""
    objects = compiler.objects(LIST_SOURCES, "-O1", f"-DK2_BUILT_{isa.upper()}")
    portable = compiler.object("kernels/portable/dense_portable.cpp", "-O1")
    program = compiler.program(f"compare_dense_{isa}_{kernel.stem}", [*objects, portable, kernel])
    seed = random.SystemRandom().randrange(2**63)
    output = run_program(program, "portable", isa, str(seed), str(cases))
    assert output == f"{cases} cases are equal\n", f"seed {seed}"


def test_avx2_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    if not supported("avx2"):
        pytest.skip("this CPU has no AVX2")
    kernel = x86_compiler.object("kernels/avx2/dense_avx2.cpp", "-O2", *AVX2)
    compare(x86_compiler, "avx2", kernel, 60)


def test_avx512_vnni_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    if not supported("avx512_vnni"):
        pytest.skip("this CPU has no AVX-512 VNNI; the model below stands in")
    kernel = x86_compiler.object("kernels/avx512_vnni/dense_avx512_vnni.cpp", "-O2", *AVX512_VNNI)
    compare(x86_compiler, "avx512_vnni", kernel, 60)


def test_avx512_vnni_on_a_model_of_its_instructions_gives_the_bits_of_portable(x86_compiler: Compiler) -> None:
    model = f"-I{CSRC / 'testing' / 'avx512_model'}"  # its immintrin.h stands before the compiler's
    kernel = x86_compiler.object("kernels/avx512_vnni/dense_avx512_vnni.cpp", "-O0", model)
    compare(x86_compiler, "avx512_vnni", kernel, 40)


@pytest.mark.parametrize(("before", "after"), [("a.v[i], b.v[i], c.v[i]", "a.v[i], b.v[i], -c.v[i]"), ("<< n", "<< 9")])
def test_the_comparison_notices_one_wrong_instruction(before: str, after: str, x86_compiler: Compiler) -> None:
    broken = x86_compiler.folder / f"broken_dense_model_{len(after)}"
    broken.mkdir(exist_ok=True)
    text = (CSRC / "testing" / "avx512_model" / "immintrin.h").read_text()
    assert before in text
    (broken / "immintrin.h").write_text(text.replace(before, after))
    kernel = x86_compiler.object("kernels/avx512_vnni/dense_avx512_vnni.cpp", "-O0", f"-I{broken}")
    with pytest.raises(AssertionError, match="expected"):
        compare(x86_compiler, "avx512_vnni", kernel, 5)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_dense_job(sanitizer: str, compiler: Compiler) -> None:
    """Under the sanitizers: the same result for every number of workers, no race, no bad access."""
    require_sanitizer(compiler, sanitizer)
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    objects = compiler.objects(JOB_SOURCES, "-O1", "-g1", *flags)
    portable = compiler.object("kernels/portable/dense_portable.cpp", "-O1", *flags)
    program = compiler.program(f"dense_job_test_{sanitizer[:6]}", [*objects, portable], *flags)
    assert run_program(program) == "ok\n"


@pytest.mark.parametrize(
    ("isa", "flags", "multiply"),
    [("avx2", AVX2, ("vfmadd", "vpmaddwd")), ("avx512_vnni", AVX512_VNNI, ("vfmadd", "vpdpbusd"))],
)
def test_probes_of_the_peak_multiply_and_do_not_move(
    isa: str, flags: tuple[str, ...], multiply: tuple[str, str], x86_compiler: Compiler
) -> None:
    """A copy or a store per sum would make the peak too low, and every share of it too high."""
    kernel = x86_compiler.object(f"kernels/{isa}/dense_{isa}.cpp", "-O3", *flags)
    for probe, name in zip(("peak_bf16", "peak_int8"), multiply, strict=True):
        loop = innermost_loop(kernel, probe)
        assert sum(instruction.startswith(name) for instruction in loop) >= 8, loop
        assert not [instruction for instruction in loop if "mov" in instruction or "(" in instruction], loop


def innermost_loop(path: Path, function: str) -> list[str]:
    """The instructions of a function's only loop: from the target of its last jump back to that jump."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    body = re.search(rf"<[^>]*{function}[^>]*>:\n((?:.+\n)+)", listing)
    assert body, f"no {function} in {path.name}"
    lines = [(int(at, 16), text) for at, text in re.findall(r"^ *([0-9a-f]+):\t(.+)$", body[1], re.MULTILINE)]
    jumps = [(int(target, 16), at) for at, text in lines for target in re.findall(r"^j\w+ +([0-9a-f]+) ", text)]
    first, last = next((target, at) for target, at in jumps if target < at)
    return [text for at, text in lines if first <= at <= last]

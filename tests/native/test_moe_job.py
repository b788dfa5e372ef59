"""A layer's computation: equal results for any number of workers, fork; no race or bad access under the sanitizers."""

from __future__ import annotations

import pytest

from tests.native.conftest import MOE_SOURCES, Compiler, require_sanitizer, run_program

TABLES = tuple(f"kernels/portable/{form}_portable.cpp" for form in ("a16", "a8"))


def test_moe_job_and_fork(compiler: Compiler) -> None:
    program = compiler.program(
        "moe_job_test", compiler.objects(("testing/moe_job_test.cpp", *MOE_SOURCES, *TABLES), "-O1")
    )
    assert run_program(program) == "ok\n"


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_moe_job_under(sanitizer: str, compiler: Compiler) -> None:
    require_sanitizer(compiler, sanitizer)
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    objects = compiler.objects(("testing/moe_job_test.cpp", *MOE_SOURCES), "-O0", "-g1", *flags)
    # The kernels' unrolled code takes minutes to compile with the address sanitizer; they run on guarded buffers in
    # test_kernel_tables.
    kernel_flags = ("-fsanitize=thread",) if sanitizer == "thread" else ()
    portable = compiler.objects(TABLES, "-O1", *kernel_flags)
    program = compiler.program(f"moe_job_test_{sanitizer[:6]}", [*objects, *portable], *flags)
    assert run_program(program, "without-fork") == "ok\n"

"""Whole layers under the sanitizers: no race, and no memory that a step leaves in use when it is given up."""

from __future__ import annotations

import pytest

from tests.native.conftest import MOE_SOURCES, Compiler, require_sanitizer, run_program
from tests.native.test_attention import seed
from tests.native.test_rows import ROWS

SOURCES = {
    *MOE_SOURCES,
    *ROWS,
    *(f"dense/{name}.cpp" for name in ("dense_matrix", "dense_job")),
    "kernels/dense_list.cpp",
    "step/layer_step.cpp",
}
KERNELS = tuple(f"kernels/portable/{form}_portable.cpp" for form in ("a16", "a8", "attention", "dense"))


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_layer_step_under(sanitizer: str, compiler: Compiler) -> None:
    require_sanitizer(compiler, sanitizer)
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    sources = sorted(SOURCES - set(KERNELS))
    objects = compiler.objects(("testing/layer_step_test.cpp", *sources), "-O0", "-g1", *flags)
    # As in test_moe_job: with the address sanitizer the kernels would take minutes to compile.
    kernels = compiler.objects(KERNELS, "-O1", *(("-fsanitize=thread",) if sanitizer == "thread" else ()))
    program = compiler.program(f"layer_step_test_{sanitizer[:6]}", [*objects, *kernels], *flags)
    assert run_program(program, seed()) == "ok\n"

"""Operations on rows, under the address sanitizer: they must not read or write beyond rows of any size."""

from __future__ import annotations

from tests.native.conftest import Compiler, require_sanitizer, run_program
from tests.native.test_attention import PORTABLE, SOURCES, seed

ROWS = (
    *(f"rows/{name}.cpp" for name in ("activation", "rms_norm", "rotate", "route")),
    "attention/append.cpp",
    *SOURCES,
)


def test_rows_under_sanitizers(compiler: Compiler) -> None:
    require_sanitizer(compiler, "address,undefined")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    objects = compiler.objects(("testing/rows_test.cpp", *ROWS, PORTABLE), "-O1", "-g1", *flags)
    assert run_program(compiler.program("rows_test", objects, *flags), seed()) == "ok\n"

"""Units of work that each worker takes its own of first: every one once, and free of data races."""

from __future__ import annotations

import pytest

from tests.native.conftest import Compiler, require_sanitizer, run_program

SOURCES = ("testing/unit_queue_test.cpp",)


@pytest.mark.parametrize("flags", [(), ("-fsanitize=thread",)], ids=["plain", "thread"])
def test_unit_queue(flags: tuple[str, ...], compiler: Compiler) -> None:
    if flags:
        require_sanitizer(compiler, "thread")
    objects = compiler.objects(SOURCES, "-O1", "-g1", *flags)
    program = compiler.program(f"unit_queue_test_{len(flags)}", objects, "-pthread", *flags)
    assert run_program(program) == "ok\n"

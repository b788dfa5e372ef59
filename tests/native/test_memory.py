"""Buffers: huge pages, NUMA policy, and what the system says about both."""

from __future__ import annotations

from tests.native.conftest import CORE_SOURCES, Compiler, run_program


def test_memory(compiler: Compiler) -> None:
    program = compiler.program("memory_test", compiler.objects(("testing/memory_test.cpp", *CORE_SOURCES), "-O1"))
    assert run_program(program) == "ok\n"

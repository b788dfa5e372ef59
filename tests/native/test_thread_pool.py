"""The thread pool: order, exceptions, cancelling, stopping, sleeping, fork; and free of data races."""

from __future__ import annotations

from tests.native.conftest import Compiler, require_sanitizer, run_program

SOURCES = ("testing/thread_pool_test.cpp", "cpu/thread_pool.cpp", "cpu/affinity.cpp")


def test_thread_pool(compiler: Compiler) -> None:
    program = compiler.program("thread_pool_test", compiler.objects(SOURCES, "-O1"))
    assert run_program(program) == "ok\n"


def test_thread_pool_has_no_data_race(compiler: Compiler) -> None:
    require_sanitizer(compiler, "thread")
    objects = compiler.objects(SOURCES, "-O1", "-g", "-fsanitize=thread")
    program = compiler.program("thread_pool_test_tsan", objects, "-fsanitize=thread")
    assert run_program(program, "without-fork") == "ok\n"

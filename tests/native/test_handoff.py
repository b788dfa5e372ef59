"""The mailbox and its server: 10,000 random schedules, late, failing and hanging experts; and free of data races."""

from __future__ import annotations

import random

import pytest

from tests.native.conftest import Compiler, require_sanitizer, run_program

SOURCES = (
    "testing/handoff_test.cpp",
    *(f"handoff/{name}.cpp" for name in ("mailbox", "expert_server")),
    *(f"cpu/{name}.cpp" for name in ("thread_pool", "affinity")),
    "core/huge_buffer.cpp",
)


def seed() -> str:
    """Draw a seed; a failing run shows it."""
    return str(random.SystemRandom().randrange(2**63))


def test_handoff(compiler: Compiler) -> None:
    program = compiler.program("handoff_test", compiler.objects(SOURCES, "-O1"))
    assert run_program(program, seed(), "10000") == "ok\n"


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_handoff_under(sanitizer: str, compiler: Compiler) -> None:
    require_sanitizer(compiler, sanitizer)
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    program = compiler.program(f"handoff_test_{sanitizer[:6]}", compiler.objects(SOURCES, "-O1", "-g1", *flags), *flags)
    assert run_program(program, seed(), "1000", "under-a-tool") == "ok\n"

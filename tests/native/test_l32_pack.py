"""Packing in pieces, checksums and refusals under the sanitizers."""

from __future__ import annotations

import random

from tests.native.conftest import CORE_SOURCES, Compiler, require_sanitizer, run_program

SOURCES = (
    "testing/l32_pack_test.cpp",
    "moe/expert_layer.cpp",
    "moe/l32_pack.cpp",
    "moe/l32_digest.cpp",
    *CORE_SOURCES,
)


def test_l32_pack(compiler: Compiler) -> None:
    sanitizer = "address,undefined"
    require_sanitizer(compiler, sanitizer)
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    program = compiler.program("l32_pack_test", compiler.objects(SOURCES, "-O1", "-g1", *flags), *flags)
    seed = random.SystemRandom().randrange(2**63)
    assert run_program(program, str(seed)) == "ok\n", f"seed {seed}"

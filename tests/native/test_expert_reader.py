"""Reading experts from files, past and through the page cache, under the sanitizers."""

from __future__ import annotations

import random
from pathlib import Path

from tests.native.conftest import CORE_SOURCES, PACKER_SOURCES, Compiler, require_sanitizer, run_program

SOURCES = (
    "testing/expert_reader_test.cpp",
    *(f"io/{name}.cpp" for name in ("shard_file", "expert_reader")),
    "moe/expert_layer.cpp",
    *PACKER_SOURCES,
    *CORE_SOURCES,
)


def test_expert_reader(compiler: Compiler, tmp_path: Path) -> None:
    sanitizer = "address,undefined"
    require_sanitizer(compiler, sanitizer)
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    program = compiler.program("expert_reader_test", compiler.objects(SOURCES, "-O1", "-g1", *flags), *flags)
    seed = random.SystemRandom().randrange(2**63)
    assert run_program(program, str(tmp_path), str(seed)) == "ok\n", f"seed {seed}"

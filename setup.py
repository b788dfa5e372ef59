"""Build the extension `hybrid_k2._native`: C++20, each file with the instruction-set flags it may use.

One binary serves every x86-64 CPU: files under csrc/kernels/<isa>/ are compiled for that instruction set and entered
only after the CPU was asked. On other architectures the portable kernels alone are built. Where the extension cannot be
built, the package installs without it and runs on numba; the first use says so.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

COMMON = ["-std=c++20", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
# gcc 12's own AVX-512 header reads variables that it leaves undefined on purpose, and warns about it; clang does not
# know the second warning.
QUIET = ["-Wno-uninitialized", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
AVX512_VNNI = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", *QUIET]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512_vnni": AVX512_VNNI,
    "avx512_bf16": [*AVX512_VNNI, "-mavx512bf16"],
    "amx_bf16": [*AVX512_VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
CSRC = Path("csrc")


def built_isas() -> list[str]:
    """Name the instruction sets, beside the portable one, that this machine's compiler can target."""
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else []


def sources() -> list[str]:
    """List the files of the extension."""
    folders = [
        CSRC,
        *(CSRC / part for part in ("attention", "core", "cpu", "dense", "handoff", "io")),
        *(CSRC / part for part in ("kernels", "moe", "rows", "runtime", "step")),
    ]
    folders += [CSRC / "kernels" / isa for isa in ("portable", *built_isas())]
    return sorted(str(path) for folder in folders for path in folder.glob("*.cpp"))


def flags(source: str) -> list[str]:
    """Return the compiler flags of one file."""
    folder = Path(source).parent
    defines = [f"-DK2_BUILT_{isa.upper()}" for isa in built_isas()]
    if folder.parent.name == "kernels":
        return [*COMMON, *defines, "-O3", "-fno-exceptions", *ISA_FLAGS.get(folder.name, [])]
    return [*COMMON, *defines, "-O2"]


class BuildNative(build_ext):
    """Compile the files in parallel, each with its own flags, and link them."""

    def build_extension(self, ext: Extension) -> None:
        """See setuptools; a failure is reported by setuptools as a warning because the extension is optional."""

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=flags(source),
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [obj for part in pool.map(compile_one, ext.sources) for obj in part]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")


def extensions() -> list[Extension]:
    """Describe the extension, or nothing where pybind11 is missing."""
    try:
        import pybind11
    except ImportError:
        print("hybrid-k2: pybind11 is missing, so the native kernels are not built", file=sys.stderr)
        return []
    native = Extension(
        "hybrid_k2._native",
        sources(),
        include_dirs=[str(CSRC), pybind11.get_include()],
        depends=[str(path) for path in CSRC.rglob("*.h")],
        language="c++",
        optional=True,
    )
    return [native]


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["hybrid_k2", "hybrid_k2.*"]), "hybrid_k2.rules"],
        package_dir={"hybrid_k2.rules": "rules"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative},
    )

"""Every kernel compiles for every card without a GPU, and fits it at the widths of K2.6."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import REPO

pytest.importorskip("triton", reason="triton is not installed")

# Bytes of shared memory that a block may have on A100, L4 and RTX 40, H100 and H200, B200, RTX 50.
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

SPILLED_BYTES = 32  # Triton 3.9 spills 8 registers of attention on sm_90; 3.7.1 none at all


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[dict[str, Any]]]:
    """What `tests.gpu.compile_kernels` says of each card."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_for(card: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "tests.gpu.compile_kernels", str(card)]
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"sm_{card}:\n{done.stderr}"
        return list(json.loads(done.stdout))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(SHARED_LIMIT, pool.map(compile_for, SHARED_LIMIT), strict=True))


@pytest.mark.parametrize("card", SHARED_LIMIT)
def test_fits_the_card(compiled: dict[int, list[dict[str, Any]]], card: int) -> None:
    for kernel in compiled[card]:
        assert kernel["shared"] <= SHARED_LIMIT[card], kernel
        assert kernel["stack"] <= SPILLED_BYTES, f"registers are spilled: {kernel}"


def test_a_kernel_is_left_out_only_where_the_card_lacks_its_type(compiled: dict[int, list[dict[str, Any]]]) -> None:
    names = {card: {kernel["name"] for kernel in kernels} for card, kernels in compiled.items()}
    everything = set.union(*names.values())
    for card, compiled_names in names.items():
        missing = everything - compiled_names
        assert all("fp8" in name for name in missing), f"sm_{card} lacks {missing}"
        assert not missing or card < 89, f"sm_{card} lacks {missing}"


def test_every_launch_says_whether_products_and_sums_may_fuse() -> None:
    launches = 0
    for path in sorted((REPO / "hybrid_k2" / "accelerator" / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches += 1
                options = [keyword.value for keyword in node.keywords if keyword.arg is None]
                assert options, f"{path.name}:{node.lineno}: expected **FUSED, or arguments that hold it"
    assert launches >= 10

"""bench/gpu_kernels.py: its cases launch at small widths, its shares are right, and it refuses without a card."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bench.gpu_kernels as bench
from tests.conftest import REPO


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card to measure")
def test_refuses_without_a_card() -> None:
    command = [sys.executable, "bench/gpu_kernels.py"]
    done = subprocess.run(command, cwd=REPO, env={"PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the GPU kernels need a CUDA device")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_the_share_is_that_of_the_limit_that_binds() -> None:
    case = bench.Case("memory", nbytes=3_000_000, operations=1, launches=[])
    measured = bench.result(case, [2.0, 1.0, 9.0], (3e12, 1e15))
    assert (measured.us, measured.gbps) == pytest.approx((2.0, 1500.0))
    assert measured.share_of_floor == pytest.approx(0.5)
    case = bench.Case("arithmetic", nbytes=1, operations=10**9, launches=[])
    assert bench.result(case, [4.0], (3e12, 1e15)).share_of_floor == pytest.approx(0.25)


def test_cases_know_their_bytes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case of the model's widths is made at small ones, and the smallest of each kind runs."""
    monkeypatch.setattr(bench, "COLD_BYTES", 1)
    widths = bench.Widths(
        hidden=64, intermediate=32, heads=2, kv_lora=16, rope=16, page=32, top_k=2, slots=32, matrices=((32, 64),)
    )
    for name, make in bench.CASES.items():
        case = next(iter(make(widths, device)))
        assert case.nbytes == {"experts": 2 * 3456, "attention": 65536, "dense": 2176}[name], case.name
        case.launches[0]()

"""Where the kernels' tests run. The choice must be made before the first kernel is imported."""

from __future__ import annotations

import os

import pytest
import torch

from hybrid_k2.accelerator.kernels import have_triton

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """A card, or the host for the interpreter."""
    if not have_triton():
        pytest.skip("triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def card() -> torch.device:
    """A card; for tests marked gpu."""
    if not have_triton() or not torch.cuda.is_available():
        pytest.skip("needs triton and a CUDA device")
    return torch.device("cuda")

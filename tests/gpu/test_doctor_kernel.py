"""The kernel that `hybrid-k2 doctor` runs on a GPU: right, and told apart from one that is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_k2.cli.doctor.gpu import check_kernel


def test_a_kernel_that_computes(device: torch.device) -> None:
    (found,) = check_kernel(device)
    assert (found.name, found.status) == ("gpu kernels", "ok"), found.text


def test_a_kernel_that_returns_something_else(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_k2.accelerator.kernels import weight_only

    multiply = weight_only.weight_only_linear

    def off(*given: object) -> Tensor:
        return multiply(*given) * 1.001  # type: ignore[arg-type]

    monkeypatch.setattr(weight_only, "weight_only_linear", off)
    (found,) = check_kernel(device)
    assert found.status == "failed"
    assert "expected what torch computes" in found.text

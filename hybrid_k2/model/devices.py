"""Translate the plan's names of devices and dtypes to torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_k2.errors import HardwareError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def torch_device(name: str) -> torch.device:
    """Return torch's device for "host", "twin" (a thread of the host) or "cuda:N".

    Raises: HardwareError if this torch has no such device.
    """
    if name in ("host", "twin"):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    device = torch.device(name)
    if device.type != "cuda" or (device.index or 0) >= count:
        raise HardwareError(
            f"device {name}: expected one that torch can use, got {count} CUDA devices in torch {torch.__version__}",
            hint="place everything on the host (rules/host.yaml), or install a build of torch for your GPU",
        )
    return device


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a dense group's dtype name."""
    return DTYPES[name]


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the calling thread does not wait for a GPU, which copies from pinned memory."""
    if device.type != "cuda" or tensor.is_cuda or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

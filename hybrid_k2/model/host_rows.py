"""Small operations on fp32 rows in host memory, by the extension: for one row, torch takes longer to get going.

A row's result depends on that row alone, bit for bit, on any CPU. `threads` is `ExpertsRuntime.native`: those that
compute where there are many rows; few are computed by the calling thread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_k2.native import native


def on_host(*rows: Tensor) -> bool:
    """Say whether these are rows that the functions here take: fp32, on the host."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in rows)


def rms_norm(threads: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide rows by their root mean square and multiply with the weight.

    Shapes: x [T, n] fp32, weight [n] bf16 or fp32 -> [T, n] fp32.
    """
    out = torch.empty(x.shape)
    native.rms_norm(threads, as_array(x.contiguous()), as_array(weight), eps, out.numpy())
    return out


def silu_times(threads: Any, gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up.

    Shapes: [T, n] fp32 each.
    """
    out = torch.empty(gate.shape)
    native.silu_times(threads, as_array(gate.contiguous()), as_array(up.contiguous()), out.numpy())
    return out


def route(
    threads: Any, logits: Tensor, bias: Tensor, experts_per_token: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose experts as `Router.route` does.

    Shapes: logits [T, E or more] fp32, bias [E] fp32 -> ids [T, K] int32, weights [T, K] fp32.
    """
    ids = torch.empty(len(logits), experts_per_token, dtype=torch.int32)
    weights = torch.empty(len(logits), experts_per_token)
    arrays = as_array(logits.contiguous()), as_array(bias)
    native.route(threads, *arrays, normalise, scale, ids.numpy(), weights.numpy())
    return ids, weights


def as_array(tensor: Tensor) -> Any:
    """Return the tensor's memory as a numpy array; bf16 becomes its bits as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

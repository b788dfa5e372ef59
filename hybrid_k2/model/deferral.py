"""Deferred experts: the last of each token's choices are added one layer late, so that the host has more time for them.

The host then computes them beside the next layer's attention, also where there is one sequence alone. It is not what
the model was trained to do: an opt-in, with a warning.
"""

from __future__ import annotations

from torch import Tensor

from hybrid_k2.experts.base import ELSEWHERE


def part_choices(ids: Tensor, deferred: int) -> tuple[Tensor, Tensor]:
    """Part each token's choices: those to compute now, and the last `deferred` ones, which can wait.

    Shapes: ids [T, K] int32, best first -> twice the same, -1 for the choices of the other part.
    """
    now, late = ids.clone(), ids.clone()
    now[:, ids.shape[1] - deferred :] = ELSEWHERE
    late[:, : ids.shape[1] - deferred] = ELSEWHERE
    return now, late

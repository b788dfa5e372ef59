"""Steps of posts and takes on the host twin, for the tests of the hand-offs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybrid_k2.accelerator import Handoff, HostTwin, Label
from hybrid_k2.experts import ExpertsBackend

Arguments = tuple[Tensor, Tensor, Tensor]


def check_step(
    twin: HostTwin, handoff: Handoff, layers: Mapping[int, ExpertsBackend], halves: Sequence[Arguments]
) -> None:
    """Post both halves to each layer and take them again, in one step; the results are those of `forward`."""
    results: list[Tensor] = []
    expected: list[Tensor] = []
    for layer, experts in layers.items():
        for half, arguments in enumerate(halves):
            expected.append(experts.forward(*arguments))
            twin.enqueue(
                lambda half=half, layer=layer, arguments=arguments: handoff.post(half, layer, *arguments),
                Label("post", layer, half),
            )
        for half in range(len(halves)):
            twin.enqueue(
                lambda half=half, layer=layer: results.append(handoff.take(half, layer)), Label("take", layer, half)
            )
    twin.synchronize(timeout_s=60)
    assert len(results) == len(expected) == 2 * len(layers)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))

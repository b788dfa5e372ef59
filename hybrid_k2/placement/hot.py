"""Hot experts: how many of each layer the GPU takes, which ones, and what that leaves to the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hybrid_k2.config import ModelConfig
from hybrid_k2.placement.claims import Claim
from hybrid_k2.placement.groups import expert_parameters, weight_bytes

Usage = Mapping[int, Sequence[int]]  # layer -> how often each of its experts was chosen


def hot_counts(claims: tuple[Claim, ...], config: ModelConfig, room: int) -> tuple[int, ...]:
    """Return how many experts of each of its layers a claim gets.

    room: bytes that the GPU has left; the claims of `hottest: auto` share what explicit ones leave, evenly by layer.
    """
    expert = weight_bytes(expert_parameters(config), "int4")
    stated = sum(len(claim.layers or ()) * (claim.rule.hottest or 0) for claim in claims)
    open_layers = sum(len(claim.layers or ()) for claim in claims if not claim.rule.hottest)
    left = max(0, room - stated * expert)
    auto = min(config.n_routed_experts, left // (open_layers * expert)) if open_layers else 0
    return tuple(claim.rule.hottest or auto for claim in claims)


def hottest(usage: Usage, layer: int, count: int) -> tuple[int, ...]:
    """Return the most used experts of a layer, ascending; of those used alike, or of unknown use, the first."""
    counts = usage.get(layer, ())
    ranked = sorted(range(len(counts)), key=lambda expert: -counts[expert]) if counts else range(count)
    return tuple(sorted(ranked[:count]))


def moved_experts(claims: tuple[Claim, ...], counts: tuple[int, ...], layers: tuple[int, ...]) -> int:
    """Count the experts of these layers that the host does not hold, because the GPU does."""
    return sum(
        count * len(set(claim.layers or ()) & set(layers))
        for claim, count in zip(claims, counts, strict=True)
        if not claim.rule.also_on_host
    )


def hot_notes(claims: tuple[Claim, ...], counts: tuple[int, ...], usage: Usage) -> Iterator[str]:
    """Say where nothing is left for hot experts, and whether it is known which those are."""
    if any(counts) and not usage:
        yield "hottest: which experts are used most is not known here yet: taken by number, and changed as it turns out"
    for claim, count in zip(claims, counts, strict=True):
        if not count:
            yield f"{claim.rule}: hottest: auto: the GPU has no room left for one expert of each layer"

"""Sort a batch's assignments of tokens to experts into tiles that belong to one expert each.

Plain torch operations of fixed shapes that never wait for the device, so that a CUDA graph can capture them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """Say which rows each tile of a grouped product computes.

    An assignment is one expert of one token; those of token t are K*t .. K*t+K-1, by ascending expert. A position is a
    place in their order by slot, then by token. Tiles that are not needed are empty: first = stop.
    Shapes: slots, weights [T, K] int32 and fp32, in the order of assignments, slot -1 for an expert that is elsewhere;
    order [T*K] int32, the assignment at each position; tile_slot, tile_first, tile_stop [tiles] int32.
    """

    slots: Tensor
    weights: Tensor
    order: Tensor
    tile_slot: Tensor
    tile_first: Tensor
    tile_stop: Tensor
    tile_tokens: int


def group_tokens(ids: Tensor, weights: Tensor, slot_of_expert: Tensor, slots: int, tile_tokens: int) -> Grouping:
    """Group assignments by the slot that holds the expert's weights.

    Shapes: ids [T, K] integer, weights [T, K] fp32, slot_of_expert [E] int32 with -1 for experts that are elsewhere.
    """
    ids, by_expert = torch.sort(ids.long(), dim=1, stable=True)  # [T, K]
    token_slots = slot_of_expert[ids]  # [T, K] int32
    keys = torch.where(token_slots < 0, slots, token_slots).flatten()  # [A]: what is elsewhere comes last
    keys, order = torch.sort(keys, stable=True)  # [A]
    bounds = torch.searchsorted(keys, torch.arange(slots + 1, device=keys.device, dtype=keys.dtype))  # [slots + 1]
    first, stop = bounds[:-1], bounds[1:]  # [slots]
    ends = ((stop - first + tile_tokens - 1) // tile_tokens).cumsum(0)  # [slots]: tiles up to and with this slot
    tile = torch.arange(min(slots, len(keys)) + len(keys) // tile_tokens, device=keys.device)  # [tiles]
    slot = torch.searchsorted(ends, tile, right=True)  # [tiles]; slots for those that are not needed
    used = slot < slots
    slot = slot.clamp(max=slots - 1)
    before = torch.where(slot > 0, ends[(slot - 1).clamp(min=0)], 0)  # [tiles]: tiles of the slots before
    tile_first = first[slot] + (tile - before) * tile_tokens
    return Grouping(
        slots=token_slots,
        weights=weights.gather(1, by_expert),
        order=order.int(),
        tile_slot=slot.int(),
        tile_first=torch.where(used, tile_first, 0).int(),
        tile_stop=torch.where(used, torch.minimum(stop[slot], tile_first + tile_tokens), 0).int(),
        tile_tokens=tile_tokens,
    )

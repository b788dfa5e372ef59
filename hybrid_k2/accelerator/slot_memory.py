"""The memory of one slot of the mailbox, as an accelerator maps it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SlotMemory:
    """Flags and payload in host memory, and a slot's state in the accelerator's; see csrc/handoff/mailbox.h.

    Shapes: request [4], reply [2] int32; hidden [room, H] fp32, of which bf16 rows take the first half; ids [room, K]
    int32; weights [room, K], output [room, H] fp32; state [2] int32 on the accelerator, zero at first: the last ticket,
    and how many programs of a post have written.
    """

    number: int
    request: Tensor
    reply: Tensor
    hidden: Tensor
    ids: Tensor
    weights: Tensor
    output: Tensor
    state: Tensor

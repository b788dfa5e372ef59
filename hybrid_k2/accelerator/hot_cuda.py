"""Hot experts on a GPU, computed by the Triton kernels from the bytes that the host has; never run on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hybrid_k2.accelerator.hot import HotExperts
from hybrid_k2.experts.base import ExpertsShape
from hybrid_k2.experts.l32 import BLOCK_BYTES, GROUP, L32Expert

# Up to here an expert's bytes cost more than its products, and the exact form is as fast as they come. Never timed.
DECODE_TOKENS = 32
PIECE_TOKENS = 1024  # of a prompt go through at a time, which bounds the work memory (placement/overheads.py)


class HotMemory:
    """Places for experts of all layers in the GPU's memory, one more than are held: what is brought arrives there.

    The kernels find an expert by its place, so that an exchange moves no weights.
    """

    def __init__(self, shape: ExpertsShape, experts: int, device: torch.device) -> None:
        """Take memory for so many experts and one more. Raises: torch.OutOfMemoryError."""
        blocks = 3 * shape.moe_intermediate_size // GROUP * (shape.hidden_size // GROUP)
        self.shape = shape
        self.weights = torch.empty(experts + 1, blocks * BLOCK_BYTES, dtype=torch.uint8, device=device)
        self._taken = 0
        self.free = experts  # the place that is free once all experts are there
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._left: torch.cuda.Event | None = None  # the last step that may read the free place

    def take_place(self, weights: L32Expert) -> int:
        """Put an expert into the next place, while the model is loaded."""
        self._write(self._taken, weights)
        self._taken += 1
        return self._taken - 1

    def write_free(self, weights: L32Expert) -> None:
        """Put an expert into the free place, beside the steps that run."""
        if self._copies is None:
            self._write(self.free, weights)
            return
        with torch.cuda.stream(self._copies):
            if self._left is not None:
                self._copies.wait_event(self._left)
            self._write(self.free, weights)
        self._copies.synchronize()

    def read(self, place: int) -> bytes:
        """Return the bytes of an expert, beside the steps that run."""
        if self._copies is None:
            return self.weights[place].numpy().tobytes()
        with torch.cuda.stream(self._copies):
            return self.weights[place].cpu().numpy().tobytes()

    def exchange(self, place: int) -> int:
        """Return the place that was free; this one is free from here on in the order of the current stream."""
        self.free, place = place, self.free
        if self._copies is not None:
            self._left = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._left.record(torch.cuda.current_stream(self.weights.device))
        return place

    def _write(self, place: int, weights: L32Expert) -> None:
        row, middle = self.weights[place], weights.w13.size
        row[:middle].copy_(torch.from_numpy(weights.w13.ravel()))
        row[middle:].copy_(torch.from_numpy(weights.w2.ravel()))


class CudaHotExperts(HotExperts):
    """Compute the hot experts of one layer. Few rows are multiplied exactly, many with weights rounded to bf16."""

    def __init__(self, memory: HotMemory, experts: Mapping[int, L32Expert], router: torch.device) -> None:
        """Take places in the memory for these experts."""
        super().__init__(experts, memory.shape.n_routed_experts, router)
        self._memory = memory
        self._checksums = {expert: weights.checksum for expert, weights in experts.items()}
        self._place_of = {expert: memory.take_place(weights) for expert, weights in experts.items()}
        places = torch.full((memory.shape.n_routed_experts,), -1, dtype=torch.int32)
        places[list(self._place_of)] = torch.tensor(list(self._place_of.values()), dtype=torch.int32)
        self._places = places.to(memory.weights.device)  # [E], -1 for those that are elsewhere

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See HotExperts; launches without waiting."""
        from hybrid_k2.accelerator.kernels.grouping import group_tokens
        from hybrid_k2.accelerator.kernels.int4_experts import DECODE, PREFILL, add_experts

        device, held = self._memory.weights.device, self._memory.weights
        tiling = DECODE if len(hidden) <= DECODE_TOKENS else PREFILL
        hidden, ids, weights = hidden.to(device).contiguous(), ids.to(device), weights.to(device)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=device)
        inner = self._memory.shape.moe_intermediate_size
        for first in range(0, len(hidden), PIECE_TOKENS):
            rows = slice(first, first + PIECE_TOKENS)
            grouping = group_tokens(ids[rows], weights[rows], self._places, len(held), tiling.tokens)
            add_experts(out[rows], hidden[rows], held, grouping, inner, tiling)
        return out

    def copy(self, expert: int) -> L32Expert:
        """See HotExperts."""
        raw = np.frombuffer(self._memory.read(self._place_of[expert]), np.uint8)
        shape = self._memory.shape
        groups, inner = shape.hidden_size // GROUP, shape.moe_intermediate_size // GROUP
        middle = 2 * inner * groups * BLOCK_BYTES
        w13 = raw[:middle].reshape(2 * inner, groups, BLOCK_BYTES)
        return L32Expert(w13, raw[middle:].reshape(groups, inner, BLOCK_BYTES), self._checksums[expert])

    def bring(self, expert: int, weights: L32Expert) -> None:
        """See HotExperts."""
        self._checksums[expert] = weights.checksum
        self._memory.write_free(weights)

    def _exchange(self, old: int, new: int) -> None:
        self._place_of[new] = self._memory.exchange(self._place_of.pop(old))
        self._places[new], self._places[old] = self._place_of[new], -1

    def close(self) -> None:
        """See HotExperts; the memory goes with the last layer."""
        self._places = self._places[:0]

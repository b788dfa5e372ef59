"""Streamed experts on a GPU: copies on a stream of their own, straight from the host's layout; never run on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybrid_k2.accelerator.hot_cuda import PIECE_TOKENS
from hybrid_k2.accelerator.stream import PLACES, Arrival, ExpertStream
from hybrid_k2.experts.base import ExpertsShape
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.experts.l32 import BLOCK_BYTES, GROUP


class CudaExpertStream(ExpertStream):
    """Copy experts into PLACES places of the GPU's memory, and compute them there by the Triton kernels.

    Where the host's memory is pinned (`pinning.py`) the copies run beside all else; where it is not, the driver copies
    through a buffer of its own, and the stream's thread waits for it.
    """

    def __init__(
        self, layers: Mapping[int, NativeExperts], shape: ExpertsShape, device: torch.device, timeout_s: float
    ) -> None:
        """Take memory for the places. Raises: torch.OutOfMemoryError."""
        self._shape = shape
        self._inner = shape.moe_intermediate_size // GROUP
        self._groups = shape.hidden_size // GROUP
        self._middle = 2 * self._inner * self._groups * BLOCK_BYTES
        bytes_of_one = self._middle + self._groups * self._inner * BLOCK_BYTES
        self._places = torch.empty(PLACES, bytes_of_one, dtype=torch.uint8, device=device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._there: dict[int, torch.cuda.Event] = {}  # place -> its copy
        self._left: dict[int, torch.cuda.Event] = {}  # place -> the last kernel that reads it
        super().__init__(layers, timeout_s)

    def compute(self, arrivals: Sequence[Arrival], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertStream; launches, and waits only for copies to be launched."""
        device = self._places.device
        return super().compute(arrivals, hidden.to(device).contiguous(), ids.to(device), weights.to(device))

    def wait_for(self, arrivals: Sequence[Arrival]) -> None:
        """See ExpertStream."""
        super().wait_for(arrivals)
        if self._copies is not None:
            self._copies.synchronize()

    def _copy(self, source: NativeExperts, expert: int, place: int) -> None:
        if self._copies is None:
            self._write(source, expert, place)
            return
        with torch.cuda.stream(self._copies):
            if (left := self._left.get(place)) is not None:
                self._copies.wait_event(left)
            self._write(source, expert, place)
            self._there[place] = self._mark()

    def _add(self, out: Tensor, some: Sequence[Arrival], hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        from hybrid_k2.accelerator.kernels.grouping import group_tokens
        from hybrid_k2.accelerator.kernels.int4_experts import PREFILL, add_experts

        places = torch.full((self._shape.n_routed_experts + 1,), -1, dtype=torch.int32)  # the last: of -1
        for arrival in some:
            places[arrival.expert] = arrival.place
        places = places.to(ids.device)
        if self._copies is not None:
            for arrival in some:
                torch.cuda.current_stream(ids.device).wait_event(self._there[arrival.place])
        for first in range(0, len(hidden), PIECE_TOKENS):
            rows = slice(first, first + PIECE_TOKENS)
            numbers = torch.where(ids[rows] < 0, self._shape.n_routed_experts, ids[rows])
            grouping = group_tokens(numbers, weights[rows], places, PLACES, PREFILL.tokens)
            add_experts(out[rows], hidden[rows], self._places, grouping, self._shape.moe_intermediate_size, PREFILL)
        if self._copies is not None:
            for arrival in some:
                self._left[arrival.place] = self._mark()

    def _write(self, source: NativeExperts, expert: int, place: int) -> None:
        """Put the slices of all NUMA nodes together, as one node would hold the expert."""
        row = self._places[place]
        w13 = row[: self._middle].view(2 * self._inner, self._groups, BLOCK_BYTES)
        w2 = row[self._middle :].view(self._groups, self._inner, BLOCK_BYTES)
        first = 0
        for w13_part, w2_part in source.view_expert(expert):
            last = first + w2_part.shape[1]
            w13[2 * first : 2 * last].copy_(torch.from_numpy(w13_part), non_blocking=True)
            w2[:, first:last].copy_(torch.from_numpy(w2_part), non_blocking=True)
            first = last

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._places.device))
        return event

"""What the layers read of a decode step, in memory that stays where it is: a graph finds the next step's there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_k2.config import ModelConfig
from hybrid_k2.model.batch import Batch, Places, SequenceSlice
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.rope import Rotation

HOST = torch.device("cpu")
# Slot, first entry in the table, length and whether it counts, of a row that no sequence has: it writes nothing to the
# cache and looks at one token, the first of the first sequence, so that its numbers are finite. Nobody reads them.
NO_SEQUENCE = (-1, 0, 1, 0)

Moves = Sequence[tuple[slice, slice]]  # rows of a batch, and those of the memory here that take them


class DecodeInputs:
    """Hold the inputs of up to `rows` sequences with one new token each, for one cache.

    Memory: on the device some KB, and 4 bytes for each of `rows` times the pages of the cache; as much on the host,
    pinned for a GPU.
    """

    def __init__(
        self, rows: int, config: ModelConfig, dtype: torch.dtype, cache: LatentCache, device: torch.device
    ) -> None:
        self._page_tokens = cache.page_tokens
        self._x = torch.zeros(rows, config.hidden_size, dtype=dtype, device=device)
        self._angles = _Staged((2, rows, config.qk_rope_head_dim // 2), torch.float32, device)
        self._numbers = _Staged((len(NO_SEQUENCE), rows), torch.int32, device)
        self._table = _Staged((rows * cache.pool.pages,), torch.int32, device)
        self._each_row = torch.arange(rows, device=device)

    def fill(self, batch: Batch, x: Tensor, rotation: Rotation, moves: Moves) -> None:
        """Bring a step over, without waiting for the device; the last step that was brought must have ended.

        Rows that no row of the batch moves to belong to no sequence.
        Shapes: x [T, hidden], on any device; rotation of T rows, on the host.
        """
        places = batch.find_places(HOST, self._page_tokens)
        numbers, angles = self._numbers.host, self._angles.host
        numbers.copy_(torch.tensor(NO_SEQUENCE)[:, None])
        for own, here in moves:
            numbers[:3, here] = torch.stack((places.slots, places.first_pages, places.lengths))[:, own]
            numbers[3, here] = 1
            angles[:, here] = torch.stack((rotation.cos, rotation.sin))[:, own]
            self._x[here].copy_(x[own], non_blocking=True)
        entries = len(places.page_table)
        self._table.host[:entries] = places.page_table
        self._numbers.send()
        self._angles.send()
        self._table.send(entries)

    def batch(self, rows: slice) -> Batch:
        """Describe some of the rows as a batch on the device: one token of each of so many sequences."""
        count = rows.stop - rows.start
        slots, first_pages, lengths, _ = self._numbers.device[:, rows]
        each, nothing = self._each_row[:count], torch.empty(0, dtype=torch.int64)
        return Batch(
            token_ids=nothing,
            positions=nothing,
            sequences=tuple(SequenceSlice(row, row + 1, 0, nothing, None) for row in range(count)),
            logit_rows=each,
            page_table=nothing,
            spans=nothing,
            places=Places(slots, self._table.device, first_pages, lengths),
        )

    def stream(self, rows: slice) -> tuple[Tensor, Rotation, Tensor]:
        """Return what starts the residual stream of these rows: themselves, their rotation, and which ones count.

        Shapes: [T, hidden], T rows, int32 [T].
        """
        cos, sin = self._angles.device[:, rows]
        return self._x[rows], Rotation(cos, sin), self._numbers.device[3, rows]


class _Staged:
    """A tensor on a device, and one on the host from which it is filled."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.device = torch.zeros(shape, dtype=dtype, device=device)
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def send(self, count: int | None = None) -> None:
        """Copy it over, or the first so many of its parts."""
        self.device[:count].copy_(self.host[:count], non_blocking=True)

"""The work of one forward pass: chunks of several sequences, prefill and decode mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from operator import itemgetter

import torch
from torch import Tensor

from hybrid_k2.model.devices import upload
from hybrid_k2.protocol.images import image_of_token, is_image_token

# Behind so many tokens, attention takes a row as many multiplications as the rest of its layer on the accelerator
# (about that at the sizes of K2.6; to cut a batch in two it need not be exact).
CONTEXT_TOKENS = 2048


@dataclass(frozen=True)
class Chunk:
    """Ask for the next tokens of one sequence; a chunk of one token is a decode step.

    `cached` tokens of the sequence are already in the cache; `pages` hold them and have room for the new ones.
    `logits`: whether those after the chunk's last token are wanted (not in the middle of a prompt); `all_logits`: those
    after each token.
    `follows`: it goes on where the chunk before it in the batch ends. A sequence's bits depend on the chunks that it is
    cut into, not on how many of them one batch holds.
    An id may stand for a row of an image (protocol/images.py).
    """

    token_ids: Sequence[int]
    cached: int
    pages: Sequence[int] | Tensor
    logits: bool = True
    follows: bool = False
    all_logits: bool = False

    @property
    def logit_rows(self) -> int:
        """How many rows of logits are wanted."""
        return len(self.token_ids) if self.all_logits else int(self.logits)


@dataclass(frozen=True)
class SequenceSlice:
    """Say which rows of a batch belong to one sequence and where its cache lies."""

    start: int
    stop: int
    cached: int
    pages: Tensor  # [pages] int64
    first_page: int | None  # set if the pages are consecutive, which saves copying them together
    follows: bool = False

    @property
    def rows(self) -> slice:
        """Rows of the batch."""
        return slice(self.start, self.stop)

    @property
    def length(self) -> int:
        """Tokens of the sequence once this batch has run."""
        return self.cached + self.stop - self.start


@dataclass(frozen=True)
class Places:
    """Say where the rows of a batch lie in the cache, in the form that the kernels of a GPU read.

    Shapes: slots int32 [T], page * page_tokens + place in the page, or -1 for a row that is not kept; page_table int32
    [P]; first_pages, lengths int32 [T], each row's first entry in the table, and how many tokens it sees.
    """

    slots: Tensor
    page_table: Tensor
    first_pages: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Seen:
    """Give the rows of a batch that come from images in place of the embedding.

    Shapes: rows [M] int64, ascending; features [M, hidden]; on the host.
    """

    rows: Tensor
    features: Tensor

    def part(self, start: int, stop: int) -> Seen | None:
        """Return what lies within rows start..stop-1, counted from `start`."""
        first, last = (int(edge) for edge in torch.searchsorted(self.rows, torch.tensor([start, stop])))
        return Seen(self.rows[first:last] - start, self.features[first:last]) if first < last else None


@dataclass(frozen=True)
class Batch:
    """Hold the tokens of one forward pass, sequence after sequence.

    `spans` says the same as `sequences` in numbers: first row, rows, cached tokens, first entry of `page_table`.
    `seen` are rows of images, whose token ids mean nothing.
    Shapes: token_ids, positions [T] int64; logit_rows [R] int64, the rows whose logits are wanted; page_table [P]
    int64, the pages of one sequence after the other; spans [S, 4] int64; all on the host, until `to` moves some.
    """

    token_ids: Tensor
    positions: Tensor
    sequences: tuple[SequenceSlice, ...]
    logit_rows: Tensor
    page_table: Tensor
    spans: Tensor
    places: Places | None = None
    seen: Seen | None = None

    @classmethod
    def build(
        cls, chunks: Sequence[Chunk], all_logits: bool = False, features: Mapping[int, Tensor] | None = None
    ) -> Batch:
        """Lay chunks one after the other; with `all_logits`, ask for the logits of every row.

        features: of the images that the chunks have tokens of, by their digests; [tokens of the image, hidden] each.
        Raises: ValueError for a batch or chunk without tokens, or a negative `cached`; KeyError for an image without
        features.
        """
        if not chunks:
            raise ValueError("batch: expected at least one chunk, got none")
        ids: list[int] = []
        positions: list[Tensor] = []
        rows: list[int] = []
        slices: list[SequenceSlice] = []
        spans: list[tuple[int, int, int, int]] = []
        pages = 0
        for chunk in chunks:
            start, stop = len(ids), len(ids) + len(chunk.token_ids)
            if stop == start or chunk.cached < 0:
                raise ValueError(f"chunk: expected tokens and cached >= 0, got {stop - start} and {chunk.cached}")
            ids.extend(chunk.token_ids)
            positions.append(torch.arange(chunk.cached, chunk.cached + stop - start))
            wanted = stop - start if all_logits else chunk.logit_rows
            rows.extend(range(stop - wanted, stop))
            slices.append(_slice(start, stop, chunk))
            spans.append((start, stop - start, chunk.cached, pages))
            pages += len(chunk.pages)
        seen = _take_images(ids, features or {})
        return cls(
            token_ids=torch.tensor(ids, dtype=torch.int64),
            positions=torch.cat(positions),
            sequences=tuple(slices),
            logit_rows=torch.tensor(rows, dtype=torch.int64),
            page_table=torch.cat([sequence.pages for sequence in slices]),
            spans=torch.tensor(spans, dtype=torch.int64),
            seen=seen,
        )

    def to(self, device: torch.device, page_tokens: int | None = None) -> Batch:
        """Return it with what the layers read on their device; `token_ids` and `spans` stay on the host.

        page_tokens: of the cache, where kernels of a GPU are to find `places`.
        """
        places = None if page_tokens is None else self.find_places(device, page_tokens)
        if device.type == "cpu":
            return self if places is None else replace(self, places=places)
        table = upload(self.page_table, device)
        pages = torch.split(table, [len(sequence.pages) for sequence in self.sequences])
        return replace(
            self,
            places=places,
            positions=upload(self.positions, device),
            sequences=tuple(replace(s, pages=own) for s, own in zip(self.sequences, pages, strict=True)),
            logit_rows=upload(self.logit_rows, device),
            page_table=table,
        )

    def find_places(self, device: torch.device, page_tokens: int) -> Places:
        """Say where the rows lie in a cache with pages of so many tokens, on a device."""
        first = torch.repeat_interleave(self.spans[:, 3], self.spans[:, 1])  # [T]
        page = self.page_table[first + self.positions // page_tokens]  # [T]
        slots = page * page_tokens + self.positions % page_tokens
        numbers = (slots, self.page_table, first, self.positions + 1)
        return Places(*(upload(number.int(), device) for number in numbers))

    def halves(self) -> list[Batch]:
        """Cut between two sequences, where the parts take about equally long; a lone sequence stays whole.

        The parts' logit rows, one part after the other, are those of the whole.
        """
        cuts = [i for i, sequence in enumerate(self.sequences) if i and not sequence.follows]
        if not cuts:
            return [self]
        costs = [(s.stop - s.start) * (CONTEXT_TOKENS + s.length) for s in self.sequences]
        before = list(accumulate(costs, initial=0))  # [S + 1]
        first = min(cuts, key=lambda i: abs(2 * before[i] - before[-1]))
        return [self._part(0, first), self._part(first, len(self.sequences))]

    def _part(self, first: int, last: int) -> Batch:
        """Return the batch of sequences first..last-1."""
        sequences = self.sequences[first:last]
        start, stop = sequences[0].start, sequences[-1].stop
        page, end_page = int(self.spans[first, 3]), int(self.spans[last - 1, 3]) + len(sequences[-1].pages)
        rows = self.logit_rows
        return Batch(
            token_ids=self.token_ids[start:stop],
            positions=self.positions[start:stop],
            sequences=tuple(replace(s, start=s.start - start, stop=s.stop - start) for s in sequences),
            logit_rows=rows[(rows >= start) & (rows < stop)] - start,
            page_table=self.page_table[page:end_page],
            spans=self.spans[first:last] - torch.tensor([start, 0, 0, page]),
            seen=None if self.seen is None else self.seen.part(start, stop),
        )


def _take_images(ids: list[int], features: Mapping[int, Tensor]) -> Seen | None:
    """Replace the ids of image rows by 0, and gather these rows."""
    if not is_image_token(max(ids)):
        return None
    rows = [row for row, token in enumerate(ids) if is_image_token(token)]
    parts: list[Tensor] = []
    for digest, run in groupby((image_of_token(ids[row]) for row in rows), key=itemgetter(0)):
        parts.append(features[digest][[row for _, row in run]])
    for row in rows:
        ids[row] = 0
    return Seen(torch.tensor(rows), torch.cat(parts))


def _slice(start: int, stop: int, chunk: Chunk) -> SequenceSlice:
    pages = torch.as_tensor(chunk.pages, dtype=torch.int64, device="cpu")
    first = int(pages[0]) if len(pages) else 0
    consecutive = torch.equal(pages, torch.arange(first, first + len(pages)))
    return SequenceSlice(start, stop, chunk.cached, pages, first if consecutive else None, chunk.follows)

"""Pack conversations into rows of one length, with document marks so that none sees another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from .conversation import conversation
from .template import render
from .tokenizer import BASE, Tokenizer, split_words
from .words import WORDS

THINKING_SHARE = 0.6


@dataclass
class Batch:
    """Hold rows of tokens. Shapes: all [rows, length]; `document` is -1 where the row is empty."""

    ids: np.ndarray
    trained: np.ndarray
    document: np.ndarray
    position: np.ndarray

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ids, positions, attention mask, and the marks of positions whose next token is learnt."""
        ids, position = (torch.from_numpy(a).to(device) for a in (self.ids, self.position))
        document = torch.from_numpy(self.document).to(device)
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask = (document[:, None, :, None] == document[:, None, None, :]) & causal
        learnt = torch.from_numpy(self.trained[:, 1:] & (self.document[:, 1:] == self.document[:, :-1])).to(device)
        return ids, position, mask, learnt


def empty(rows: int, length: int) -> Batch:
    """Make rows without content."""
    return Batch(
        np.zeros((rows, length), np.int64),
        np.zeros((rows, length), bool),
        np.full((rows, length), -1, np.int64),
        np.zeros((rows, length), np.int64),
    )


def put(batch: Batch, row: int, start: int, ids: list[int], trained: list[bool], document: int) -> None:
    """Write one document into a row."""
    span = slice(start, start + len(ids))
    batch.ids[row, span] = ids
    batch.trained[row, span] = trained
    batch.document[row, span] = document
    batch.position[row, span] = np.arange(len(ids))


def fill(batch: Batch, rows: range, rng: Random, tokenizer: Tokenizer, max_turns: int) -> None:
    """Pack whole conversations into the rows, each into the first row with room."""
    length = batch.ids.shape[1]
    used = dict.fromkeys(rows, 0)
    document, misses = 0, 0
    while misses < 12:
        thinking = rng.random() < THINKING_SHARE
        c = conversation(rng, thinking, max_turns)
        ids, trained = tokenizer.encode(render(c.messages, c.tools, thinking))
        row = next((r for r in rows if used[r] + len(ids) <= length), None)
        if row is None:
            misses += 1
            continue
        put(batch, row, used[row], ids, trained, document)
        used[row] += len(ids)
        document += 1


def fill_with_copies(batch: Batch, rows: range, rng: Random) -> None:
    """Fill rows with random sequences that are written again and again.

    Copying names, digits and arguments rests on attention that finds the earlier place; this teaches it first.
    """
    length = batch.ids.shape[1]
    for row in rows:
        start, document = 0, 10**6
        while length - start >= 16:
            size = rng.randint(3, 20)
            times = min(max(2, rng.randint(24, 96) // size), (length - start) // size)
            if times < 2:
                break
            low, high = (48, 58) if rng.random() < 0.35 else (0, BASE)  # digits, or any token
            ids = [rng.randrange(low, high) for _ in range(size)] * times
            put(batch, row, start, ids, [False] * size + [True] * (len(ids) - size), document)
            start += len(ids)
            document += 1


def make_batch(rng: Random, tokenizer: Tokenizer, rows: int, length: int, max_turns: int, copy_rows: int = 0) -> Batch:
    """Draw a batch of conversations, the last `copy_rows` rows being copying drills."""
    batch = empty(rows, length)
    fill(batch, range(rows - copy_rows), rng, tokenizer, max_turns)
    fill_with_copies(batch, range(rows - copy_rows, rows), rng)
    return batch


def count_pieces(seed: int, conversations: int) -> Counter[bytes]:
    """Count the pieces that the vocabulary is trained on."""
    rng, counts = Random(seed), Counter[bytes]()
    for _ in range(conversations):
        c = conversation(rng, True)
        for part in render(c.messages, c.tools, True):
            if not part.control:
                counts.update(split_words(part.text))
    for word in WORDS:
        counts[b" " + word.encode()] += 2
    return counts

from __future__ import annotations

import random

import pytest
import torch

from hybrid_k2.model.batch import Batch, Chunk


def test_lays_chunks_one_after_the_other() -> None:
    batch = Batch.build([Chunk([5, 6, 7], 0, [0]), Chunk([8], 70, [3, 1]), Chunk([9, 9], 4, [7, 8], logits=False)])
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 9]
    assert batch.positions.tolist() == [0, 1, 2, 70, 4, 5]
    assert batch.logit_rows.tolist() == [2, 3]
    assert [(s.start, s.stop, s.cached, s.length) for s in batch.sequences] == [
        (0, 3, 0, 3),
        (3, 4, 70, 71),
        (4, 6, 4, 6),
    ]
    assert [s.first_page for s in batch.sequences] == [0, None, 7]
    assert [s.pages.tolist() for s in batch.sequences] == [[0], [3, 1], [7, 8]]


def test_all_logits_and_none() -> None:
    chunks = [Chunk([1, 2], 0, torch.tensor([0]), logits=False), Chunk([3], 0, torch.tensor([1]), logits=False)]
    assert Batch.build(chunks, all_logits=True).logit_rows.tolist() == [0, 1, 2]
    assert Batch.build(chunks).logit_rows.tolist() == []


@pytest.mark.parametrize("chunks", [[], [Chunk([], 0, [0])], [Chunk([1], -1, [0])]])
def test_refuses_what_is_no_work(chunks: list[Chunk]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Batch.build(chunks)


def test_halves_say_what_their_chunks_say() -> None:
    chance = random.Random()
    for _ in range(50):
        chunks = [
            Chunk([chance.randrange(99) for _ in range(n)], chance.randrange(200), [9 * i, 9 * i + 4], bool(n % 2))
            for i, n in enumerate(chance.choices([1, 1, 2, 7, 30], k=chance.randint(1, 7)))
        ]
        every = chance.random() < 0.5
        halves = Batch.build(chunks, every).halves()
        cut = len(halves[0].sequences)
        assert len(halves) == min(2, len(chunks))
        for half, part in zip(halves, (chunks[:cut], chunks[cut:]), strict=False):
            alone = Batch.build(part, every)
            for field in ("token_ids", "positions", "logit_rows", "page_table", "spans"):
                assert torch.equal(getattr(half, field), getattr(alone, field)), field
            for got, expected in zip(half.sequences, alone.sequences, strict=True):
                assert (got.start, got.stop, got.cached, got.first_page) == (
                    expected.start,
                    expected.stop,
                    expected.cached,
                    expected.first_page,
                )
                assert torch.equal(got.pages, expected.pages)


@pytest.mark.parametrize(
    ("sizes", "cached", "first"),
    [
        ([1, 1], [0, 0], 1),
        ([1, 1, 1, 1], [0, 0, 0, 0], 2),
        ([40, 1, 1], [0, 0, 0], 1),
        ([1, 1, 40], [0, 0, 0], 2),
        ([1, 1, 1, 1], [100_000, 0, 0, 0], 1),  # attention to a long context takes as long as many rows
    ],
)
def test_halves_take_about_equally_long(sizes: list[int], cached: list[int], first: int) -> None:
    batch = Batch.build([Chunk([0] * n, c, [0]) for n, c in zip(sizes, cached, strict=True)])
    assert len(batch.halves()[0].sequences) == first


def test_places_are_where_the_cache_puts_the_rows() -> None:
    """For kernels of a GPU: the slot of each new token, its sequence's pages, and the tokens that it sees."""
    page_tokens = 4
    for _ in range(20):
        pages = torch.randperm(30).tolist()
        chunks = []
        for _ in range(random.randint(1, 4)):
            cached, new = random.randint(0, 9), random.randint(1, 7)
            own = [pages.pop() for _ in range(-(-(cached + new) // page_tokens) + random.randint(0, 1))]
            chunks.append(Chunk([1] * new, cached, own))
        batch = Batch.build(chunks).to(torch.device("cpu"), page_tokens)
        assert batch.places is not None
        expected = [
            (
                list(chunk.pages),
                position + 1,
                chunk.pages[position // page_tokens] * page_tokens + position % page_tokens,
            )
            for chunk in chunks
            for position in range(chunk.cached, chunk.cached + len(chunk.token_ids))
        ]
        table = batch.places.page_table.tolist()
        rows = zip(
            batch.places.first_pages.tolist(), batch.places.lengths.tolist(), batch.places.slots.tolist(), strict=True
        )
        for (own, length, slot), (first, found_length, found_slot) in zip(expected, rows, strict=True):
            assert (table[first : first + len(own)], found_length, found_slot) == (own, length, slot)
    assert Batch.build([Chunk([1], 0, [0])]).to(torch.device("cpu")).places is None


def test_halves_never_part_what_follows() -> None:
    """Chunks of one sequence stay together, as the lone chunk of a sequence does."""
    long = [Chunk([0] * 40, 40 * i, [0], follows=i > 0) for i in range(4)]
    assert len(Batch.build(long).halves()) == 1
    halves = Batch.build([Chunk([0], 0, [1]), *long, Chunk([0], 0, [2])]).halves()
    assert sorted(len(half.sequences) for half in halves) in ([1, 5],)

from __future__ import annotations

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

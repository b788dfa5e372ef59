"""Split decode attention against float64, with pages in any order and rubbish behind the last token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from hybrid_k2.accelerator.kernels.mla_decode import SMALL, Tiling, mla_decode, tiling_for


def compare(
    device: torch.device, tiling: Tiling, lengths: list[int], heads: int, lora: int, rope: int, page: int
) -> None:
    counts = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(counts) + 3)[: sum(counts)].int()
    cache = torch.full((sum(counts) + 3, page, lora + rope), torch.nan, dtype=torch.bfloat16)
    first_pages = torch.tensor([sum(counts[:i]) for i in range(len(counts))], dtype=torch.int32)
    q = torch.randn(len(lengths), heads, lora + rope) * 2
    scale = (lora + rope) ** -0.5
    expected = torch.empty(len(lengths), heads, lora, dtype=torch.float64)
    for row, (length, first) in enumerate(zip(lengths, first_pages.tolist(), strict=True)):
        latents = torch.randn(length, lora + rope).bfloat16()
        for place in range(length):
            cache[order[first + place // page], place % page] = latents[place]
        weights = (q[row].double() @ latents.double().T * scale).softmax(-1)
        expected[row] = weights @ latents[:, :lora].double()
    lengths_ = torch.tensor(lengths, dtype=torch.int32)
    arguments = (t.to(device) for t in (q, cache, order, first_pages, lengths_))
    result = mla_decode(*arguments, scale, lora, tiling).cpu()
    # A score's error: 576 products of which one factor is rounded to bf16, scores have a deviation of about 2. It moves
    # the weights by as much, which are rounded to bf16 as well; both are averaged over the keys.
    spread = 2 * 2**-9 / 3**0.5
    error = (result.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (error <= 4 * (spread + 2**-9)).all()


def test_equals_float64_at_ragged_lengths(device: torch.device) -> None:
    tiling = replace(SMALL, keys=16, splits=4, split_keys=16)
    compare(device, tiling, [1, 83, 16, 49], heads=5, lora=64, rope=16, page=32)
    compare(device, replace(SMALL, splits=2), [70], heads=20, lora=32, rope=16, page=64)


def test_rows_of_one_sequence_share_its_pages(device: torch.device) -> None:
    cache = torch.randn(3, 32, 48).bfloat16()
    q = torch.randn(1, 4, 48).expand(2, -1, -1).contiguous()
    table, first = torch.tensor([2, 0], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    lengths = torch.tensor([33, 34], dtype=torch.int32)
    result = mla_decode(*(t.to(device) for t in (q, cache, table, first, lengths)), 0.3, 32, replace(SMALL, splits=2))
    latents = cache[[2, 0]].flatten(0, 1).double()
    for row, length in enumerate((33, 34)):
        weights = (q[row].double() @ latents[:length].T * 0.3).softmax(-1)
        torch.testing.assert_close(result[row].cpu().double(), weights @ latents[:length, :32], rtol=0.02, atol=0.02)


def test_sizes_that_do_not_fit_are_refused() -> None:
    numbers = torch.zeros(1, dtype=torch.int32)
    cache = torch.zeros(1, 64, 80, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="kv_lora: expected a power of two"):
        mla_decode(torch.zeros(1, 2, 80), cache, numbers, numbers, numbers, 1.0, 48, SMALL)
    with pytest.raises(ValueError, match="cache: expected contiguous bf16"):
        mla_decode(torch.zeros(1, 2, 80), cache.float(), numbers, numbers, numbers, 1.0, 64, SMALL)
    with pytest.raises(ValueError, match="page: expected a multiple of 32 tokens"):
        mla_decode(torch.zeros(1, 2, 80), cache.view(4, 16, 80), numbers, numbers, numbers, 1.0, 64, SMALL)


@pytest.mark.gpu
def test_equals_float64_at_full_width(card: torch.device) -> None:
    for tiling in (SMALL, tiling_for(torch.cuda.get_device_capability()[0])):
        compare(card, tiling, [1, 5000, 64, 777], heads=64, lora=512, rope=64, page=64)

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import EngineError, MemoryBudgetError
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.latent_cache import LatentCache, PagePool
from hybrid_k2.placement.plan import KvCachePlan
from tests.generators import config_dict

CONFIG = ModelConfig.from_dict(config_dict(), "test")


def make_cache(tokens: int = 1000, page_tokens: int = 64, dtype: str = "fp32") -> LatentCache:
    plan = KvCachePlan(device="host", dtype=dtype, tokens=tokens, page_tokens=page_tokens, nbytes=0)
    return LatentCache(plan, CONFIG)


def write(cache: LatentCache, layer: int, latents: torch.Tensor, pages: list[int], sizes: list[int]) -> torch.Tensor:
    """Append latents in chunks of these sizes, and gather them again."""
    done = 0
    for size in sizes:
        sequence = Batch.build([Chunk([0] * size, done, pages)]).sequences[0]
        cache.append(layer, sequence, latents[done : done + size])
        done += size
    return cache.gather(layer, sequence)


@settings(max_examples=60)
@given(st.data())
def test_gather_returns_what_was_appended(data: st.DataObject) -> None:
    page_tokens = data.draw(st.integers(1, 9))
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    cache = make_cache(200, page_tokens)
    needed = cache.pages_for(sum(sizes))
    pages = data.draw(st.permutations(range(cache.pool.pages)))[: needed + data.draw(st.integers(0, 2))]
    if data.draw(st.booleans()):
        pages = (
            list(range(min(pages), min(pages) + needed)) if min(pages) + needed <= cache.pool.pages else sorted(pages)
        )
    latents = torch.randn(2, sum(sizes), CONFIG.latent_dim)
    for layer in cache.layers:
        layer.fill_(torch.nan)
    first = write(cache, 0, latents[0], pages, sizes).clone()
    second = write(cache, 2, latents[1], pages, sizes)
    assert torch.equal(first, latents[0])
    assert torch.equal(second, latents[1])
    assert cache.layers[1].isnan().all()  # no other layer was written
    assert int((~cache.layers[0].isnan()).sum()) == latents[0].numel()  # and nothing but the tokens


def test_consecutive_pages_are_not_copied() -> None:
    cache = make_cache()
    latents = torch.randn(130, CONFIG.latent_dim)
    view = write(cache, 1, latents, [4, 5, 6], [130])
    assert view.data_ptr() == cache.layers[1][4].data_ptr()
    assert torch.equal(write(cache, 1, latents, [9, 2, 11], [64, 66]), view)


def test_stores_in_the_dtype_of_the_plan() -> None:
    latents = torch.randn(10, CONFIG.latent_dim)
    for pages in ([3], [3, 1]):
        got = write(make_cache(dtype="bf16"), 0, latents, pages, [10])
        assert torch.equal(got, latents.bfloat16())


def test_memory_is_touched_by_writing_only() -> None:
    before = psutil.Process().memory_info().rss
    tokens = (1 << 30) // (CONFIG.latent_dim * 4)
    cache = make_cache(tokens)
    assert sum(layer.nbytes for layer in cache.layers) >= 3 << 30
    write(cache, 0, torch.randn(100, CONFIG.latent_dim), [cache.pool.pages - 2, cache.pool.pages - 1], [100])
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_check_names_what_does_not_fit() -> None:
    cache = make_cache(640)
    cache.check(Batch.build([Chunk([0] * 64, 64, [0, 9])]))
    with pytest.raises(EngineError, match="expected pages for 129 tokens of a sequence, got 2 pages with room for 128"):
        cache.check(Batch.build([Chunk([0], 0, [1]), Chunk([0], 128, [0, 9])]))
    for page in (10, -1):
        with pytest.raises(EngineError, match="expected page numbers below 10"):
            cache.check(Batch.build([Chunk([0], 0, [page])]))


def test_size_in_pages() -> None:
    cache = make_cache(1000)
    assert (cache.pool.pages, cache.tokens, cache.pool.available) == (16, 1024, 16)
    assert [cache.pages_for(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]


def test_unknown_device_is_an_error() -> None:
    plan = cast(KvCachePlan, SimpleNamespace(device="cuda:77", dtype="bf16", tokens=64, page_tokens=64))
    with pytest.raises(Exception, match="device cuda:77: expected one that torch can use"):
        LatentCache(plan, CONFIG)


@settings(max_examples=60)
@given(st.lists(st.integers(-3, 5), max_size=40))
def test_pool_hands_out_each_page_once(steps: list[int]) -> None:
    pool, held = PagePool(13), list[int]()
    for step in steps:
        if step < 0:
            back, held = held[:-step], held[-step:]
            pool.free(back)
        elif step <= pool.available:
            lowest = sorted(set(range(13)) - set(held))[:step]
            pages = pool.allocate(step)
            assert pages == lowest
            held += pages
        else:
            with pytest.raises(EngineError, match=f"expected {step} free pages, got {pool.available} of 13"):
                pool.allocate(step)
        assert len(held) == len(set(held)) == 13 - pool.available


@pytest.mark.parametrize("pages", [[0, 0], [2], [0, 99], [-1]])
def test_pool_refuses_pages_that_are_not_taken(pages: list[int]) -> None:
    pool = PagePool(4)
    assert pool.allocate(2) == [0, 1]
    with pytest.raises(ValueError, match="expected pages that are taken"):
        pool.free(pages)
    assert pool.available == 2


def test_a_cache_that_has_no_room_is_one_error() -> None:
    with pytest.raises(MemoryBudgetError, match=r"KV cache of \d+ tokens: expected room in host memory, got none left"):
        make_cache(tokens=1 << 45, page_tokens=1 << 45)


def test_a_page_is_free_when_its_last_user_gave_it_back() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    pool.share(pages[:2])
    pool.share(pages[:1])
    assert [pool.users(page) for page in range(4)] == [3, 2, 1, 0]
    pool.free(pages)
    assert pool.available == 2
    pool.free(pages[:2])
    pool.free(pages[:1])
    assert pool.available == 4
    for wrong in ([0], [9], [1, 1]):
        with pytest.raises(ValueError, match="expected pages that are taken"):
            pool.share(wrong)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pages_are_read_written_and_copied_in_all_layers(dtype: str) -> None:
    cache = make_cache(300, 64, dtype)
    for layer in cache.layers:
        layer.copy_(torch.randn(layer.shape))
    before = [layer.clone() for layer in cache.layers]
    content = cache.read_page(3)
    assert (content.shape, content.dtype) == (cache.page_like().shape, cache.page_like().dtype)
    cache.copy_page(1, 3)
    cache.write_page(0, content)
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer, old[[3, 1, 2, 1, 4]])

"""The paged cache of latent attention: per token and layer, the normalised latent and the rotated shared key."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import EngineError
from hybrid_k2.model.batch import Batch, SequenceSlice
from hybrid_k2.model.devices import torch_device, torch_dtype
from hybrid_k2.model.room import room_for

if TYPE_CHECKING:
    from hybrid_k2.placement.plan import KvCachePlan


class PagePool:
    """Account for the pages of a cache: who asks gets the lowest free numbers. One thread at a time may use it.

    A page may have several users (sequences with one prefix); it is free again when the last one has given it back.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages))  # a heap, so that a sequence alone gets consecutive pages
        self._users: dict[int, int] = {}  # of each page that is taken

    @property
    def available(self) -> int:
        """Free pages."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take pages.

        Raises: EngineError if there are not enough; nothing is taken then.
        """
        if count > self.available:
            raise EngineError(
                f"KV cache: expected {count} free pages, got {self.available} of {self.pages}",
                hint="shorten the conversation, or give kv_cache more tokens in the placement rules",
            )
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._users.update(dict.fromkeys(pages, 1))
        return pages

    def users(self, page: int) -> int:
        """Count the users of a page; 0 if it is free."""
        return self._users.get(page, 0)

    def share(self, pages: Iterable[int]) -> None:
        """Add a user to pages, who gives them back in turn. Raises: ValueError for a page that is not taken."""
        for page in self._checked(pages):
            self._users[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back.

        Raises: ValueError for a page that is not taken; nothing is given back then.
        """
        for page in self._checked(pages):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                heapq.heappush(self._free, page)

    def _checked(self, pages: Iterable[int]) -> list[int]:
        listed = list(pages)
        if len(set(listed)) != len(listed) or not self._users.keys() >= set(listed):
            raise ValueError(f"KV cache: expected pages that are taken, each once, got {listed}")
        return listed


class LatentCache:
    """Store latents in pages; `pool` says which are free.

    A host touches the memory of a page only when a token is written to it.
    Shapes: per layer [pages, page_tokens, latent_dim] in the plan's dtype.
    """

    def __init__(self, plan: KvCachePlan, config: ModelConfig, device: torch.device | str | None = None) -> None:
        """Reserve the pages on the plan's device, or on `device`. Raises: MemoryBudgetError."""
        self.page_tokens = plan.page_tokens
        self.pool = PagePool(-(-plan.tokens // plan.page_tokens))
        shape = (self.pool.pages, plan.page_tokens, config.latent_dim)
        where = torch_device(plan.device) if device is None else torch.device(device)
        dtype = torch_dtype(plan.dtype)
        with room_for(f"KV cache of {plan.tokens} tokens", plan.device):
            self.layers = [torch.empty(shape, dtype=dtype, device=where) for _ in range(config.num_hidden_layers)]

    @property
    def tokens(self) -> int:
        """Tokens that fit."""
        return self.pool.pages * self.page_tokens

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens of one sequence."""
        return -(-tokens // self.page_tokens)

    def page_like(self) -> Tensor:
        """Return a tensor without memory that has the shape and dtype of `read_page`."""
        shape = (len(self.layers), *self.layers[0].shape[1:])
        return torch.empty(shape, dtype=self.layers[0].dtype, device="meta")

    def read_page(self, page: int) -> Tensor:
        """Copy a page to the host.

        Shapes: -> [layers, page_tokens, latent_dim] in the cache's dtype.
        """
        return torch.stack([layer[page].cpu() for layer in self.layers])

    def write_page(self, page: int, content: Tensor) -> None:
        """Fill a page with what `read_page` gave."""
        for layer, latents in zip(self.layers, content, strict=True):
            layer[page].copy_(latents)
        self._settle()

    def copy_page(self, source: int, target: int) -> None:
        """Fill a page with the content of another."""
        for layer in self.layers:
            layer[target].copy_(layer[source])
        self._settle()

    def close(self) -> None:
        """Give the memory back. Nothing can be read or written then; `pool` goes on counting."""
        self.layers = [layer.new_empty((0, *layer.shape[1:])) for layer in self.layers]

    def _settle(self) -> None:
        """Wait until a GPU has what was written: the streams of the model do not wait for this one."""
        if self.layers[0].is_cuda:
            torch.cuda.synchronize(self.layers[0].device)

    def check(self, batch: Batch) -> None:
        """Check that each sequence's pages exist and have room for its new tokens.

        Raises: EngineError.
        """
        for sequence in batch.sequences:
            room = len(sequence.pages) * self.page_tokens
            if sequence.length > room:
                raise EngineError(
                    f"KV cache: expected pages for {sequence.length} tokens of a sequence, got "
                    f"{len(sequence.pages)} pages with room for {room}"
                )
            if (
                len(sequence.pages)
                and not 0 <= int(sequence.pages.min()) <= int(sequence.pages.max()) < self.pool.pages
            ):
                raise EngineError(f"KV cache: expected page numbers below {self.pool.pages}, got {sequence.pages}")

    def append(self, layer: int, sequence: SequenceSlice, latent: Tensor) -> None:
        """Write the latents of a sequence's new tokens behind its cached ones.

        Shapes: latent [stop - start, latent_dim].
        """
        rows = self.layers[layer].view(-1, latent.shape[-1])  # [pages * page_tokens, latent_dim]
        if sequence.first_page is not None:
            first = sequence.first_page * self.page_tokens + sequence.cached
            rows[first : first + len(latent)].copy_(latent)
            return
        positions = torch.arange(sequence.cached, sequence.length, device=sequence.pages.device)
        pages = sequence.pages[positions // self.page_tokens]
        slots = pages * self.page_tokens + positions % self.page_tokens
        rows.index_copy_(0, slots.to(rows.device), latent.to(rows))

    def gather(self, layer: int, sequence: SequenceSlice) -> Tensor:
        """Return the latents of a sequence in order: a view where its pages are consecutive, else a copy.

        Shapes: [length, latent_dim] in the cache's dtype.
        """
        store = self.layers[layer]
        if sequence.first_page is not None:
            pages = store[sequence.first_page : sequence.first_page + self.pages_for(sequence.length)]
        else:
            pages = store[sequence.pages[: self.pages_for(sequence.length)].to(store.device)]
        return pages.flatten(0, 1)[: sequence.length]

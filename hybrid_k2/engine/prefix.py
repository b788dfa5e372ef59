"""Keep latents of prompts and replies for later prompts that begin alike: a radix tree over pages, in two levels.

A node is one page: the tokens whose latents it holds, behind those of its parents. The first level are pages of the
KV cache. What is used least recently leaves it when a sequence needs pages, for the second level: plain host memory of
`ram_bytes`, from where it comes back when a prompt wants it. On a plan whose KV cache lies in host memory the second
level is simply more of it, beyond the pages of the plan.

Pages of nodes are read by any number of sequences at once and never written again: a sequence that goes on in the
middle of a page gets a copy.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile

from torch import Tensor

from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.model.latent_cache import LatentCache


@dataclass(eq=False)
class Node:
    """Hold one page of the tree. Its latents are in `page` of the cache, or in `stored`; a root has neither.

    The first `repeatable` of its tokens have the bits that computing them again would give. A node with fewer tokens
    than a page has no children.
    """

    tokens: tuple[int, ...]
    parent: Node | None
    repeatable: int = 0
    page: int | None = None
    stored: Tensor | None = None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    _order: list[tuple[int, ...]] = field(default_factory=list)  # the children's tokens, sorted

    @property
    def resident(self) -> bool:
        """Whether it is in the first level."""
        return self.page is not None

    def add(self, child: Node) -> None:
        """Put a node below this one; there is none with its tokens."""
        self.children[child.tokens] = child
        insort(self._order, child.tokens)

    def remove(self, child: Node) -> None:
        """Take a node out from below this one."""
        del self.children[child.tokens]
        del self._order[bisect_left(self._order, child.tokens)]

    def closest(self, tokens: tuple[int, ...]) -> tuple[Node | None, int]:
        """Return the child that has most first tokens in common with these, and how many; of equals the better one.

        There may be thousands, all with the same first words: the closest stand next to the tokens in sorted order.
        """
        place = bisect_left(self._order, tokens)
        beside = [self.children[near] for near in self._order[max(0, place - 1) : place + 1]]
        found = max(beside, key=lambda node: (_common(node.tokens, tokens), node.repeatable), default=None)
        length = 0 if found is None else _common(found.tokens, tokens)
        return (found, length) if length else (None, 0)

    def longer(self, tokens: tuple[int, ...]) -> Iterator[Node]:
        """List the children that begin with these tokens, and go on."""
        for place in range(bisect_left(self._order, tokens), len(self._order)):
            if self._order[place][: len(tokens)] != tokens:
                return
            yield self.children[self._order[place]]

    def shorter(self, tokens: tuple[int, ...]) -> list[Node]:
        """List the children that these tokens begin with, and go on."""
        if not self.children:
            return []
        parts = (tokens[:length] for length in range(1, len(tokens)))
        return [self.children[part] for part in parts if part in self.children]


class PrefixCache:
    """Own the pages of the tree, and hand out pages: those that nobody uses are free for the asking.

    `salt` of a sequence chooses the tree: what is kept under one is never found under another. One thread at a time.
    """

    def __init__(self, cache: LatentCache, ram_bytes: int = 0) -> None:
        self._cache = cache
        self._page_tokens = cache.page_tokens
        self._roots: dict[str, Node] = {}
        # From the least to the most recently used; a child always stands before its parent.
        self._resident: OrderedDict[Node, None] = OrderedDict()
        self._stored: OrderedDict[Node, None] = OrderedDict()
        self.ram_pages = 0  # that the second level has room for
        self.changes = 0  # how often it may have come to know a prefix, or got room
        self.set_ram(ram_bytes)

    def set_ram(self, ram_bytes: int) -> None:
        """Give the second level so much host memory."""
        self.ram_pages = ram_bytes // self.page_like().nbytes
        self._trim()

    def page_like(self) -> Tensor:
        """Return a tensor on the meta device with the shape and dtype of a page's latents."""
        return self._cache.page_like()

    @property
    def kept_pages(self) -> int:
        """Pages of the KV cache that the tree holds, those in use by sequences included."""
        return len(self._resident)

    @property
    def stored_pages(self) -> int:
        """Pages in the second level."""
        return len(self._stored)

    def has_room(self, count: int) -> bool:
        """Say whether `allocate` can give so many pages: free ones, and those of the tree that no sequence uses."""
        missing = max(0, count - self._cache.pool.available)
        return sum(1 for _ in islice(self._spare(), missing)) == missing

    def allocate(self, count: int) -> list[int]:
        """Take pages; what was used least recently makes room.

        Raises: EngineError if there are not enough; nothing is taken then.
        """
        missing = count - self._cache.pool.available
        spare = [*islice(self._spare(), max(0, missing))]
        if len(spare) >= missing:
            for node in spare:
                self._demote(node)
        return self._cache.pool.allocate(count)

    def lend(self, sequence: TokenSequence) -> None:
        """Give a sequence without pages those of the longest known prefix of its tokens.

        At least one token is left to be computed: its logits are wanted. A sequence that repeats gets only latents that
        computing them again would give bit for bit.
        """
        path, reused, repeatable = self._reusable(sequence)
        block = sequence.block_tokens
        full, rest = divmod(reused, self._page_tokens)
        self._touch(path)
        with self._held(path[full] if rest else None) as fill:
            pages = self._bring(path[:full])
            if fill is not None and len(pages) == full and self.has_room(1):
                (copy,) = self.allocate(1)
                fill(copy)
                pages.append(copy)
        sequence.pages = pages
        sequence.cached = min(reused, len(pages) * self._page_tokens)
        sequence.repeatable = min(sequence.cached, repeatable) // block * block

    def in_use(self, sequence: TokenSequence) -> int:
        """Count the pages that `lend` would give and that others use already: they take no room."""
        path, reused, _ = self._reusable(sequence)
        shared = (node.page for node in path[: reused // self._page_tokens])
        return sum(page is not None and self._cache.pool.users(page) > 1 for page in shared)

    def publish(self, sequence: TokenSequence) -> None:
        """Let others use the full pages of a sequence that goes on."""
        self._insert(sequence, sequence.cached // self._page_tokens * self._page_tokens)

    def keep(self, sequence: TokenSequence) -> None:
        """Take over the pages of a sequence that is done, was broken off, or gives them up for a while."""
        self._insert(sequence, sequence.cached)
        self.take_back(sequence)

    def take_back(self, sequence: TokenSequence) -> None:
        """Free the pages of a sequence without keeping what they hold."""
        self.changes += 1
        self._cache.pool.free(sequence.pages)
        sequence.pages = []
        sequence.cached = sequence.repeatable = 0

    def release(self) -> None:
        """Drop everything: also when logits were not finite, so that no damaged latent is used again."""
        self.changes += 1
        for root in self._roots.values():
            for node in [*root.children.values()]:
                self._drop(node)
        self._roots.clear()

    def nodes(self) -> Iterator[tuple[str, Node]]:
        """List all nodes with their salt, the most recently used first, a parent before its children."""
        salts = {node: salt for salt, root in self._roots.items() for node in _all_below(root)}
        for node in [*reversed(self._resident), *reversed(self._stored)]:
            yield salts[node], node

    def content(self, node: Node) -> Tensor:
        """Return the latents of a node. Shapes: -> [layers, page_tokens, latent_dim], on the host."""
        if node.stored is not None:
            return node.stored
        assert node.page is not None
        return self._cache.read_page(node.page)

    def restore(self, nodes: Iterable[tuple[str, Node]]) -> int:
        """Start with these nodes in the second level, in the order of `nodes`, whose parents are None for a root.

        Returns how many there is room for.
        """
        self.release()
        added = [*islice(nodes, self.ram_pages)]
        for salt, node in added:
            node.parent = node.parent or self._root(salt)
            node.parent.add(node)
        self._stored.update((node, None) for _, node in reversed(added))
        return len(added)

    def _root(self, salt: str) -> Node:
        """Return the tree of a salt that is about to get nodes; those that have lost theirs go when a new one comes."""
        if salt not in self._roots:
            self._roots = {name: root for name, root in self._roots.items() if root.children}
            self._roots[salt] = Node((), None)
        return self._roots[salt]

    def _parts(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        for start in range(0, len(tokens), self._page_tokens):
            yield tuple(tokens[start : start + self._page_tokens])

    def _reusable(self, sequence: TokenSequence) -> tuple[list[Node], int, int]:
        """Return the nodes of the longest common prefix, the tokens to reuse, and how many are repeatable blocks."""
        if sequence.reads_prompt:
            return [], 0, 0
        path, common, repeatable = self._find(sequence)
        if sequence.repeats:
            return path, min(repeatable, sequence.repeats_until), repeatable
        return path, common, repeatable

    def _find(self, sequence: TokenSequence) -> tuple[list[Node], int, int]:
        """Return the nodes of the longest common prefix, its tokens, and how many of them are repeatable blocks."""
        node = self._roots.get(sequence.salt) or Node((), None)
        path, common, repeatable = list[Node](), 0, 0
        for part in self._parts(sequence.tokens[:-1]):
            child, length = node.children.get(part), len(part)
            if child is None:
                child, length = node.closest(part)
            if child is None:
                break
            if repeatable == common:
                repeatable += min(length, child.repeatable)
            common += length
            path.append(child)
            node = child
            if length < self._page_tokens:
                break
        return path, common, repeatable // sequence.block_tokens * sequence.block_tokens

    def _bring(self, path: Sequence[Node]) -> list[int]:
        """Share the pages of nodes, brought into the first level as far as there is room."""
        pages = [node.page for node in path if node.page is not None]  # parents of resident nodes are resident
        self._cache.pool.share(pages)
        absent = path[len(pages) :]
        for node in absent:
            del self._stored[node]  # so that making room does not drop it
        for place, node in enumerate(absent):
            if not self.has_room(1):
                for left in reversed(absent[place:]):
                    self._stored[left] = None
                break
            (page,) = self.allocate(1)
            self._cache.write_page(page, self.content(node))
            self._make_resident(node, page)
            pages.append(page)
        self._touch(path[: len(pages)])
        self._trim()
        return pages

    @contextmanager
    def _held(self, node: Node | None) -> Iterator[Callable[[int], None] | None]:
        """Hold the latents of a node, whatever is dropped meanwhile; give what fills a page with them."""
        if node is None:
            yield None
        elif node.page is None:
            yield partial(self._cache.write_page, content=self.content(node))
        else:
            page = node.page
            self._cache.pool.share([page])
            try:
                yield partial(self._cache.copy_page, page)
            finally:
                self._cache.pool.free([page])

    def _make_resident(self, node: Node, page: int) -> None:
        """Put a node in the first level, its latents in a page that its caller has and goes on using."""
        self._cache.pool.share([page])
        if node.page is not None:
            self._cache.pool.free([node.page])
        self._stored.pop(node, None)
        node.page, node.stored = page, None
        self._resident[node] = None
        self._resident.move_to_end(node)

    def _insert(self, sequence: TokenSequence, count: int) -> None:
        """Put the first `count` tokens of a sequence in the tree; nodes that are there stay, unless it has better."""
        self.changes += 1
        node, path = self._root(sequence.salt), list[Node]()
        for place, part in enumerate(self._parts(sequence.tokens[:count])):
            repeatable = sequence.repeatable - place * self._page_tokens
            repeatable = max(0, min(repeatable, len(part)))
            node = self._place(node, part, repeatable, sequence.pages[place])
            if node.tokens == part and repeatable == node.repeatable == len(part):  # the same bits
                self._share_instead(sequence, place, node)
            path.append(node)
        self._touch(path)
        self._trim()

    def _place(self, parent: Node, part: tuple[int, ...], repeatable: int, page: int) -> Node:
        node = parent.children.get(part)
        if node is None and len(part) < self._page_tokens:
            node = next((other for other in parent.longer(part) if other.repeatable >= repeatable), None)
            if node is not None:
                return node
        if node is None:
            for other in parent.shorter(part):
                if other.repeatable <= repeatable:
                    self._drop(other)
            node = Node(part, parent)
            parent.add(node)
        if not node.resident or repeatable > node.repeatable:
            self._make_resident(node, page)
            node.repeatable = repeatable
        return node

    def _share_instead(self, sequence: TokenSequence, place: int, node: Node) -> None:
        """Let a sequence that computed what others had computed meanwhile use their page, and free its own."""
        own = sequence.pages[place]
        if node.page is not None and node.page != own:
            self._cache.pool.share([node.page])
            self._cache.pool.free([own])
            sequence.pages[place] = node.page

    def _touch(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            (self._resident if node.resident else self._stored).move_to_end(node)

    def _spare(self) -> Iterator[Node]:
        """List what could leave the first level, in this order: nodes that no sequence uses, nor their children."""
        used: set[Node | None] = set()
        for node in self._resident:
            assert node.page is not None
            if node in used or self._cache.pool.users(node.page) > 1:
                used.add(node.parent)
            else:
                yield node

    def _demote(self, node: Node) -> None:
        """Move a node to the second level, or drop it where there is none."""
        if not self.ram_pages:
            self._drop(node)
            return
        node.stored = self.content(node)
        self._stored[node] = None
        del self._resident[node]
        self._cache.pool.free([node.page] if node.page is not None else [])
        node.page = None
        self._trim()

    def _trim(self) -> None:
        """Drop what the second level has no room for, the least recently used first: never a parent before a child."""
        while len(self._stored) > self.ram_pages:
            self._drop(next(iter(self._stored)))

    def _drop(self, node: Node) -> None:
        """Remove a node and all below it."""
        for gone in [*_all_below(node), node]:
            self._resident.pop(gone, None)
            self._stored.pop(gone, None)
            if gone.page is not None:
                self._cache.pool.free([gone.page])
            gone.page = gone.stored = None
        if node.parent is not None:
            node.parent.remove(node)


def _all_below(node: Node) -> list[Node]:
    """List the nodes below one, parents first. A long conversation is a chain that recursion would not survive."""
    below = [*node.children.values()]
    for child in below:  # which grows meanwhile
        below.extend(child.children.values())
    return below


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))

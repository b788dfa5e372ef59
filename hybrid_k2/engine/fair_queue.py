"""A queue that is fair between keys: whoever got the fewest tokens so far comes next.

Source: the virtual token counter of "Fairness in Serving Large Language Models" (arXiv 2401.00588).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar


class Keyed(Protocol):
    """Anything that belongs to a key."""

    @property
    def key(self) -> str:
        """Whose it is."""
        ...


T = TypeVar("T", bound=Keyed)


class FairQueue(Generic[T]):
    """Hold waiting items by key, in order of arrival within a key.

    A key's counter is what it was charged. One that comes, or comes back after a pause, starts at the lowest counter of
    those that are there, if its own was not higher: time in which it asked for nothing is no credit, and to ask for one
    thing after the other does not wipe out what was taken. When nobody is there, all counters are forgotten.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._served: dict[str, int] = {}  # of keys that wait or run
        self._left: dict[str, int] = {}  # of others that have taken more than one who is there

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[T]:
        for items in self._waiting.values():
            yield from items

    def waiting(self, key: str) -> int:
        """Count the items of a key."""
        return len(self._waiting.get(key, ()))

    def add(self, item: T) -> None:
        """Put an item behind the others of its key."""
        self._line(item.key).append(item)

    def put_back(self, item: T) -> None:
        """Put an item before the others of its key: it had its turn and could not keep it."""
        self._line(item.key).appendleft(item)

    def remove(self, item: T) -> None:
        """Take an item out, wherever it stands. Raises: ValueError if it does not wait."""
        self._waiting.get(item.key, deque()).remove(item)
        self._tidy(item.key)

    def first(self, may_run: Callable[[str], bool]) -> T | None:
        """Return whose turn it is, of the keys that may run, and leave it in the queue."""
        keys = [key for key in self._waiting if may_run(key)]
        return self._waiting[min(keys, key=self._served.__getitem__)][0] if keys else None

    def charge(self, key: str, tokens: int) -> None:
        """Count tokens that were computed for a key."""
        self._served[key] = self._served.get(key, 0) + tokens

    def gone(self, key: str) -> None:
        """Take note that a key neither waits nor runs."""
        if key in self._waiting or key not in self._served:
            return
        self._left[key] = self._served.pop(key)
        lowest = min(self._served.values(), default=None)
        self._left = {} if lowest is None else {key: taken for key, taken in self._left.items() if taken > lowest}

    def _line(self, key: str) -> deque[T]:
        if key not in self._served:
            self._served[key] = max(min(self._served.values(), default=0), self._left.pop(key, 0))
        return self._waiting.setdefault(key, deque())

    def _tidy(self, key: str) -> None:
        if not self._waiting.get(key):
            self._waiting.pop(key, None)

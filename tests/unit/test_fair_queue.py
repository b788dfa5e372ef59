from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from hybrid_k2.engine.fair_queue import FairQueue


@dataclass(eq=False)
class Item:
    key: str
    tokens: int = 1


def serve(queue: FairQueue[Item], rounds: int) -> list[Item]:
    """Take whose turn it is, and charge what it costs."""
    served = []
    for _ in range(rounds):
        item = queue.first(lambda key: True)
        if item is None:
            break
        queue.remove(item)
        queue.charge(item.key, item.tokens)
        served.append(item)
    return served


def test_within_a_key_the_first_comes_first() -> None:
    queue, items = FairQueue[Item](), [Item("a") for _ in range(5)]
    for item in items:
        queue.add(item)
    assert [*queue] == items
    back = items[3]
    queue.remove(back)
    queue.put_back(back)
    assert serve(queue, 9) == [back, *items[:3], items[4]]
    assert len(queue) == 0


def test_keys_that_always_wait_get_about_the_same_tokens() -> None:
    chance = random.Random()
    queue = FairQueue[Item]()
    for key, most in (("small", 10), ("medium", 100), ("large", 1000)):
        for _ in range(3000):
            queue.add(Item(key, chance.randint(1, most)))
    tokens: Counter[str] = Counter()
    for item in serve(queue, 2000):
        tokens[item.key] += item.tokens
    assert max(tokens.values()) - min(tokens.values()) <= 2000


def test_who_comes_late_gets_no_credit_and_does_not_wait() -> None:
    queue = FairQueue[Item]()
    for _ in range(100):
        queue.add(Item("a", 10))
    serve(queue, 50)
    for _ in range(100):
        queue.add(Item("b", 10))
    turns = Counter(item.key for item in serve(queue, 40))
    assert turns == {"a": 20, "b": 20}


def test_who_runs_counts_also_when_he_does_not_wait() -> None:
    queue = FairQueue[Item]()
    queue.add(Item("a", 1000))
    serve(queue, 1)
    queue.add(Item("b"))
    queue.add(Item("a"))
    assert Counter(item.key for item in serve(queue, 2)) == {"a": 1, "b": 1}


def test_only_keys_that_may_run_are_asked() -> None:
    queue, item = FairQueue[Item](), Item("b")
    queue.add(Item("a"))
    queue.add(item)
    assert queue.first(lambda key: key == "b") is item
    assert queue.first(lambda key: False) is None


def test_who_asks_for_one_thing_after_the_other_keeps_his_counter() -> None:
    queue = FairQueue[Item]()
    for _ in range(200):
        queue.add(Item("patient", 10))
    turns: Counter[str] = Counter()
    for _ in range(110):
        if not queue.waiting("greedy"):
            queue.add(Item("greedy", 100))
        (item,) = serve(queue, 1)
        turns[item.key] += item.tokens
        if not queue.waiting(item.key):
            queue.gone(item.key)
    assert abs(turns["greedy"] - turns["patient"]) <= 110


def test_of_many_keys_that_come_once_nothing_is_left() -> None:
    queue, waiting = FairQueue[Item](), Item("a")
    queue.add(waiting)
    for number in range(50):
        queue.add(Item(f"key {number}", number))
        queue.remove(item := next(item for item in queue if item is not waiting))
        queue.charge(item.key, item.tokens)
        queue.gone(item.key)
    assert len(queue._left) <= 49  # they have taken more than one who waits
    queue.remove(waiting)
    queue.gone("a")
    assert not queue._left
    assert not queue._served


def test_who_is_gone_is_forgotten() -> None:
    queue, item = FairQueue[Item](), Item("a", 500)
    queue.add(item)
    queue.gone("a")  # it waits
    assert serve(queue, 1) == [item]
    queue.gone("a")
    assert not queue._served
    with pytest.raises(ValueError, match="not in"):
        queue.remove(item)

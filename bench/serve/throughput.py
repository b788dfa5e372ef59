"""Tokens per second of one stream and of several, in turns."""

from __future__ import annotations

import asyncio
import time
from statistics import median
from typing import Any

from bench.serve.process import Server
from bench.serve.replies import stream_reply


async def throughput(server: Server, *, counts: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Measure each number of streams once in each round, after one round that does not count.

    A round's figure is all tokens over the time from the first request to the end of the last reply. No prompt is
    found in a cache. Ratios are medians of the ratios to the first count within a round.
    """
    speeds: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(rounds + 1):
        for count in counts:
            speed = await _speed(server, count, tokens, turn)
            if turn:
                speeds[count].append(speed)
    first = speeds[counts[0]]
    return {
        "tokens": tokens,
        "rounds": rounds,
        "tokens_per_s": {str(count): round(median(of), 2) for count, of in speeds.items()},
        "ratio": {
            str(count): round(median(one / base for one, base in zip(of, first, strict=True)), 3)
            for count, of in speeds.items()
        },
        "samples": {str(count): [round(one, 2) for one in of] for count, of in speeds.items()},
    }


async def _speed(server: Server, count: int, tokens: int, turn: int) -> float:
    """Return the tokens per second of so many streams. Raises: AssertionError: one ended early."""
    requests = [
        {
            "messages": [{"role": "user", "content": f"What is {3 * number + turn} + {number}?"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "seed": 1000 * turn + number,
            "cache_salt": f"{turn}/{count}/{number}",
        }
        for number in range(count)
    ]
    start = time.perf_counter()
    replies = await asyncio.gather(*(stream_reply(server, request) for request in requests))
    seconds = time.perf_counter() - start
    assert all(choice.tokens == tokens for (choice,) in replies), "a reply ended early"
    return count * tokens / seconds

"""Many streams for a long time, and clients that misbehave: what survives must be right, and nothing may be left."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.serve.http import post
from bench.serve.pool import MALFORMED, good_requests
from bench.serve.process import Server
from bench.serve.replies import RefusedError, stream_reply, text_of

MAX_GROWTH = 0.02
EDGE_SHARE = 0.2  # the memory at the start and at the end are medians over so much of the time
QUIET_S = 60.0
AGAIN = 6  # requests that are asked once more at the end: the server must still answer
_SHOWN_FAILURES = 20
# What a client does next, and how often.
_READ, _HANG_UP, _LEAVE_EARLY, _LEAVE_UNSAID, _MALFORMED = "read", "hang_up", "leave_early", "unsaid", "malformed"
_ACTIONS = {_READ: 70, _HANG_UP: 12, _LEAVE_EARLY: 8, _LEAVE_UNSAID: 3, _MALFORMED: 7}


@dataclass
class Findings:
    """What happened, and what should not have."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def fail(self, text: str) -> None:
        """Take note of a failure."""
        self.counts["failures"] += 1
        if len(self.failures) < _SHOWN_FAILURES:
            self.failures.append(text)


async def soak(
    server: Server,
    *,
    streams: int,
    seconds: float,
    warm_up_s: float,
    pool: int,
    seed: int,
    patience_s: float,
    quiet_s: float = QUIET_S,
    max_growth: float = MAX_GROWTH,
) -> dict[str, Any]:
    """Load the server and return what was found; `failures` is empty if all is well.

    Memory counts from `warm_up_s` on: until then caches fill and allocators find their size.
    patience_s: a request that takes longer is stuck. quiet_s: how long the server may take to clear up at the end.
    max_growth: of the memory, as a share.
    """
    requests = good_requests(pool, seed)
    alone = [text_of(await asyncio.wait_for(stream_reply(server, request), patience_s)) for request in requests]
    findings = Findings()
    until = time.monotonic() + seconds
    memory = asyncio.create_task(_sample_memory(server, warm_up_s, until))
    clients = [
        _client(server, requests, alone, random.Random(seed * 1000 + number), until, patience_s, findings)
        for number in range(streams)
    ]
    peak = asyncio.create_task(_sample_figures(server, until))
    await asyncio.gather(*clients)
    rss, most = await memory, await peak
    left = await _left_over(server, quiet_s)
    await _check_end(server, requests, alone, left, patience_s, findings)
    if rss and rss["growth"] > max_growth:
        findings.fail(f"memory: expected growth of at most {max_growth:.0%}, got {rss['growth']:.2%}")
    return {
        "streams": streams,
        "seconds": seconds,
        "requests": dict(sorted(findings.counts.items())),
        "rss": rss,
        "at_most": most,
        "left_over": left,
        "failures": findings.failures,
    }


async def _client(
    server: Server,
    requests: list[dict[str, Any]],
    alone: list[str],
    chance: random.Random,
    until: float,
    patience_s: float,
    findings: Findings,
) -> None:
    """Act at random until the time is over."""
    while time.monotonic() < until:
        (action,) = chance.choices(list(_ACTIONS), list(_ACTIONS.values()))
        index = chance.randrange(len(requests))
        if action == _READ:
            work = _read(server, index, requests[index], alone[index], findings)
        elif action == _MALFORMED:
            work = _send_malformed(server, chance, findings)
        else:
            work = _leave(server, requests[index], action, chance)
        if await _done(work, f"{action}: request {index}", patience_s, findings):
            findings.counts[action] += 1


async def _done(work: Awaitable[None], what: str, patience_s: float, findings: Findings) -> bool:
    """Do something and say whether it came to its end; take note of a failure if not."""
    try:
        await asyncio.wait_for(work, patience_s)
    except asyncio.TimeoutError:
        findings.fail(f"{what} was not answered in {patience_s:.0f} s")
    except (RefusedError, OSError) as error:
        findings.fail(f"{what}: {type(error).__name__}: {error}")
    else:
        return True
    return False


async def _read(server: Server, index: int, request: dict[str, Any], alone: str, findings: Findings) -> None:
    said = text_of(await stream_reply(server, request))
    if said != alone:
        findings.fail(f"request {index}: expected, as alone, {alone}, got {said}")


async def _send_malformed(server: Server, chance: random.Random, findings: Findings) -> None:
    name = chance.choice(list(MALFORMED))
    async with server.exchange() as exchange:
        await exchange.send(MALFORMED[name])
        status, _ = await exchange.head()
        if not 400 <= status < 500:
            findings.fail(f"malformed ({name}): expected a status of 400 to 499, got {status}")


async def _leave(server: Server, request: dict[str, Any], action: str, chance: random.Random) -> None:
    """Send a request and go before its end: in the middle of the stream, at once, or with half of the body unsent."""
    streamed = chance.random() < 0.7
    body = json.dumps({**request, "stream": streamed}).encode()
    async with server.exchange() as exchange:
        if action == _LEAVE_UNSAID:
            await exchange.send(post(body[: len(body) // 2], length=len(body)))
            await asyncio.sleep(chance.random() * 0.2)
        else:
            await exchange.send(post(body))
            if action == _LEAVE_EARLY or not streamed:
                await asyncio.sleep(chance.random() * (0.1 if action == _LEAVE_EARLY else 2.0))
            else:
                status, headers = await exchange.head()
                if status != 200:
                    raise RefusedError(f"{status}: {await exchange.body(headers)!r}")
                count = chance.randrange(1, 40)
                async for _ in exchange.frames():
                    count -= 1
                    if not count:
                        break
        if chance.random() < 0.5:
            exchange.reset()


async def _sample_memory(server: Server, warm_up_s: float, until: float) -> dict[str, Any] | None:
    """Look at the server's memory every second; the share of growth is that of the medians at both ends."""
    await asyncio.sleep(warm_up_s)
    samples = []
    while time.monotonic() < until:
        rss = server.rss_bytes()
        if rss is None:
            return None
        samples.append(rss)
        await asyncio.sleep(1)
    edge = max(1, round(EDGE_SHARE * len(samples)))
    start, end = median(samples[:edge]), median(samples[-edge:])
    return {
        "start_bytes": start,
        "end_bytes": end,
        "max_bytes": max(samples),
        "growth": end / start - 1,
        "samples": len(samples),
    }


async def _sample_figures(server: Server, until: float) -> dict[str, float]:
    """Return the largest figures that were seen: they say how heavy the load was."""
    most: dict[str, float] = {}
    while time.monotonic() < until:
        for name, value in (await server.figures()).items():
            if name.startswith("num_requests") or name.startswith("kv_cache_pages"):
                most[name] = max(most.get(name, 0), value)
        await asyncio.sleep(1)
    return most


async def _left_over(server: Server, quiet_s: float) -> dict[str, float]:
    """Return what the server still holds when nobody asks anything, once it has come to rest."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_pages_used")
    deadline = time.monotonic() + quiet_s
    while True:
        figures = await server.figures()
        left = {name: figures[name] for name in names}
        if not any(left.values()) or time.monotonic() > deadline:
            counters = ("num_preemptions_total", "engine_failed_steps_total", "kv_cache_pages", "kv_cache_pages_kept")
            return left | {name: figures[name] for name in counters}
        await asyncio.sleep(0.5)


async def _check_end(
    server: Server,
    requests: list[dict[str, Any]],
    alone: list[str],
    left: dict[str, float],
    patience_s: float,
    findings: Findings,
) -> None:
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_pages_used", "engine_failed_steps_total"):
        if left[name]:
            findings.fail(f"at the end: expected {name} 0, got {left[name]:g}")
    if left["kv_cache_pages_kept"] > left["kv_cache_pages"]:
        findings.fail("at the end: expected no more pages kept than there are")
    for index, request in enumerate(requests[:AGAIN]):
        work = _read(server, index, request, alone[index], findings)
        await _done(work, f"at the end: request {index}", patience_s, findings)

"""Measure the time to the first token of a prompt, cold and when it comes again, through a service.

    python bench/first_token.py [--model demo] [--rules host] [--tokens 4096] [--rounds 7]

Each round draws a new prompt and asks for one token: cold, then again. Rounds with and without a seed take turns; the
medians count. A prompt that comes again is to cost at most a tenth of a cold one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time

from hybrid_k2 import Engine, SamplingParams
from hybrid_k2.engine.service import Service
from hybrid_k2.engine.service_types import Finished, ServiceEvent, ServiceRequest


def first_token_s(service: Service, prompt: list[int], seed: int | None) -> tuple[float, int]:
    """Return the time of one request for one token, and how many of its tokens were cached."""
    ended = threading.Event()
    last: list[ServiceEvent] = []

    def take(event: ServiceEvent) -> None:
        last[:] = [event]
        if isinstance(event, Finished):
            ended.set()

    params = SamplingParams(seed=seed, max_tokens=1, ignore_eos=True)
    start = time.perf_counter()
    service.submit(ServiceRequest(prompt=prompt, params=params), take)
    ended.wait()
    elapsed = time.perf_counter() - start
    (finished,) = last
    assert isinstance(finished, Finished)
    return elapsed, finished.reply.usage.cached_tokens


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rules", default="host", help="a rule file, or the name of a shipped one")
    parser.add_argument("--tokens", type=int, default=4096, help="of a prompt")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    chance = random.Random(0)
    cold: list[float] = []
    again: dict[str, list[float]] = {"with a seed": [], "without": []}
    cached: dict[str, int] = {}
    with Engine.load(args.model, args.rules) as engine, Service(engine) as service:
        for turn in range(2 * args.rounds + 1):
            prompt = [chance.randrange(engine.config.vocab_size // 2) for _ in range(args.tokens)]
            kind, seed = ("with a seed", turn) if turn % 2 else ("without", None)
            first, _ = first_token_s(service, prompt, seed)
            second, cached[kind] = first_token_s(service, prompt, seed)
            if turn:  # the first one warms up
                cold.append(first)
                again[kind].append(second)
    base = statistics.median(cold)
    print(f"{args.tokens} tokens, {engine.experts_name}, medians of {args.rounds} rounds")
    print(f"{'cold':14}{base * 1e3:9.1f} ms")
    for kind, times in again.items():
        median = statistics.median(times)
        print(f"{kind:14}{median * 1e3:9.1f} ms  {median / base:6.1%}  {cached[kind]} tokens cached")


if __name__ == "__main__":
    main()

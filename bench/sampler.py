"""Measure the choice of one token over a vocabulary of K2.6's size, for common settings and kinds of logits.

python bench/sampler.py [--seconds 0.3]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.sampling import Sampler

VOCAB = 163_840
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "K2.6 thinking (top-p 0.95)": {},
    "top-k 50, top-p 0.95": {"top_k": 50},
    "min-p 0.05": {"min_p": 0.05, "top_p": 1.0},
    "temperature alone": {"top_p": 1.0},
    "top-p and penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
}


def kinds_of_logits() -> dict[str, torch.Tensor]:
    """Return logits like a model's (few tokens hold the mass), normal ones, and nearly equal ones."""
    normal = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    peaked = 2 * normal
    peaked[:20] += 15
    return {"peaked": peaked, "normal, sigma 3": 3 * normal, "flat": 0.01 * normal}


def best_ms(sampler: Sampler, logits: torch.Tensor, seconds: float) -> float:
    """Return the least processor time of many calls: one thread works, and neighbours on its core do not count."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.thread_time()
        sampler.sample(logits)
        best = min(best, time.thread_time() - start)
    return best * 1e3


def main() -> None:
    """Print a table of milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each cell")
    seconds = parser.parse_args().seconds
    kinds = kinds_of_logits()
    print(f"{'ms per token':28}" + "".join(f"{name:>17}" for name in kinds))
    for name, setting in SETTINGS.items():
        params = SamplingParams(**setting).over(SamplingParams.defaults(True))
        row = [best_ms(Sampler(params, VOCAB, range(1000)), logits, seconds) for logits in kinds.values()]
        print(f"{name:28}" + "".join(f"{value:17.2f}" for value in row))


if __name__ == "__main__":
    main()

"""Train the demo model for a given time, saving its state so that a run can be resumed or watched."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random

import torch
from torch import multiprocessing

from .batches import count_pieces, make_batch
from .model import Model
from .parallel import Counters, Shared, Worker, lone_barrier
from .tokenizer import Tokenizer, save_vocabulary, train_vocabulary

# Rows of all processes together, length, most turns.
SHORT, LONG, LONGEST = (20, 320, 4), (8, 768, 8), (4, 1536, 14)
LONG_FROM = 0.65  # fraction of the run after which rows get long
INT4_FROM = 0.72  # fraction after which the experts are rounded in the forward pass
COPY_UNTIL, COPY_SHARE = 0.33, 0.25
SAVE_SECONDS = 180


def vocabulary(out: Path) -> Tokenizer:
    """Load the vocabulary, training it first where it is missing."""
    path = out / "tiktoken.model"
    if not path.exists():
        save_vocabulary(train_vocabulary(count_pieces(seed=11, conversations=30000)), path)
    return Tokenizer(path)


def form(step: int, fraction: float) -> tuple[int, int, int]:
    """Choose rows, length and turns of the next batch, the same in all processes."""
    if fraction < LONG_FROM:
        return SHORT
    return Random(step).choices([SHORT, LONG, LONGEST], [0.3, 0.5, 0.2])[0]


def work(rank: int, shared: Shared, out: Path, minutes: float, seed: int) -> None:
    """Train until the minutes are used up, going on from a saved state if there is one."""
    torch.set_num_threads(1)
    tokenizer, worker = Tokenizer(out / "tiktoken.model"), Worker(shared, rank)
    if (out / "state.pt").exists():
        worker.load(out / "state.pt")
    counters = worker.counters
    before, started = counters.seconds, time.time()
    rng = Random(f"{seed}/{rank}/{counters.step}")
    saved, log = started, (out / "log.jsonl").open("a")
    while True:
        if rank == 0:
            counters.seconds = before + time.time() - started
            shared.fraction[0] = counters.seconds / (60 * minutes)
        shared.barrier.wait()
        fraction = float(shared.fraction)
        if fraction >= 1:
            break
        rows, length, turns = form(counters.step, fraction)
        rows //= shared.workers
        copies = round(rows * COPY_SHARE * max(0.0, 1 - fraction / COPY_UNTIL))
        for moe in shared.model.mixtures():
            moe.int4 = fraction >= INT4_FROM
        worker.step(make_batch(rng, tokenizer, rows, length, turns, copies), fraction)
        if rank == 0 and counters.step % 20 == 0:
            log.write(json.dumps(vars(counters)) + "\n")
            log.flush()
        if rank == 0 and time.time() - saved > SAVE_SECONDS:
            worker.save(out / "state.pt")
            saved = time.time()
    if rank == 0:
        worker.save(out / "state.pt")


def train(out: Path, minutes: float, seed: int, workers: int) -> Counters:
    """Train on the GPU in this process if there is one, else in `workers` processes on the CPU."""
    out.mkdir(parents=True, exist_ok=True)
    vocabulary(out)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        work(0, Shared.create(Model().cuda(), 1, lone_barrier()), out, minutes, seed)
    else:
        context = multiprocessing.get_context("spawn")
        shared = Shared.create(Model(), workers, context.Barrier(workers))
        multiprocessing.spawn(work, (shared, out, minutes, seed), nprocs=workers)
    return Counters(**torch.load(out / "state.pt", map_location="cpu")["counters"])


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=95)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(train(args.out, args.minutes, args.seed, args.workers))


if __name__ == "__main__":
    main()

"""Train the demo model for a given time, saving its state so that a run can be resumed or watched."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import multiprocessing

from .batches import count_pieces, make_batch
from .export import load
from .induction import prime
from .model import Model
from .optim import rate_factor
from .parallel import Counters, Shared, Worker, lone_barrier
from .tokenizer import Tokenizer, save_vocabulary, train_vocabulary
from .words import PRACTICE

# Rows of all processes together, length, most turns.
SHORT, LONG, LONGEST = (12, 256, 4), (4, 768, 8), (2, 1536, 14)
SAVE_SECONDS = 120


@dataclass(frozen=True)
class Schedule:
    """Say what happens when; all but the rate and the share are fractions of the run."""

    peak_rate: float
    decay_from: float  # constant rate before, linear decay after
    long_from: float  # longer conversations
    int4_from: float  # the experts are rounded in the forward pass
    copy_share: float  # of the rows at the start: copying drills
    copy_until: float
    practice_from: float  # more of the words and tools that are hard to copy


SCRATCH = Schedule(
    3e-3, decay_from=0.45, long_from=0.6, int4_from=0.7, copy_share=0.2, copy_until=0.4, practice_from=0.87
)
CONTINUED = Schedule(
    2e-3, decay_from=0.2, long_from=0.6, int4_from=0.6, copy_share=0.2, copy_until=0.5, practice_from=0.8
)
POLISHED = Schedule(
    5e-4, decay_from=0.1, long_from=0.25, int4_from=0.0, copy_share=0.05, copy_until=0.5, practice_from=0.0
)


def vocabulary(out: Path, start: Path | None) -> None:
    """Put the vocabulary into the run's folder: that of the checkpoint to start from, or a new one."""
    path = out / "tiktoken.model"
    if path.exists():
        return
    if start:
        path.write_bytes((start / "tiktoken.model").read_bytes())
    else:
        save_vocabulary(train_vocabulary(count_pieces(seed=11, conversations=30000)), path)


def form(step: int, long: bool) -> tuple[int, int, int]:
    """Choose rows, length and turns of the next batch, the same in all processes."""
    if not long:
        return SHORT
    return Random(step).choices([SHORT, LONG, LONGEST], [0.4, 0.4, 0.2])[0]


def work(rank: int, shared: Shared, out: Path, minutes: float, seed: int, plan: Schedule) -> None:
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
        rows, length, turns = form(counters.step, fraction >= plan.long_from)
        rows //= shared.workers
        copies = round(rows * plan.copy_share * max(0.0, 1 - fraction / plan.copy_until) + rng.random() - 0.5)
        if fraction >= plan.practice_from:
            PRACTICE.spaced, PRACTICE.invented = 0.3, 2.0
        for moe in shared.model.mixtures():
            moe.int4 = fraction >= plan.int4_from
        rate = plan.peak_rate * rate_factor(counters.step, fraction, plan.decay_from)
        worker.step(make_batch(rng, tokenizer, rows, length, turns, copies), rate, fraction)
        if rank == 0 and counters.step % 20 == 0:
            log.write(json.dumps(vars(counters)) + "\n")
            log.flush()
        if rank == 0 and time.time() - saved > SAVE_SECONDS:
            worker.save(out / "state.pt")
            saved = time.time()
    if rank == 0:
        worker.save(out / "state.pt")


def train(
    out: Path, minutes: float, seed: int, workers: int, start: Path | None = None, polish: bool = False
) -> Counters:
    """Train on the GPU in this process if there is one, else in `workers` processes on the CPU.

    `start`: an exported checkpoint of the same shape whose weights and vocabulary are taken over; `polish`: they
    are good already, so that a low rate over INT4 weights is enough.
    """
    out.mkdir(parents=True, exist_ok=True)
    vocabulary(out, start)
    torch.manual_seed(seed)
    plan = SCRATCH if start is None else POLISHED if polish else CONTINUED
    if start is None:
        model = Model()
        prime(model)
    else:
        model = load(start).train()
    if torch.cuda.is_available():
        work(0, Shared.create(model.cuda(), 1, lone_barrier()), out, minutes, seed, plan)
    else:
        context = multiprocessing.get_context("spawn")
        shared = Shared.create(model, workers, context.Barrier(workers))
        multiprocessing.spawn(work, (shared, out, minutes, seed, plan), nprocs=workers)
    PRACTICE.reset()  # on a GPU this process trained, and scores next
    return Counters(**torch.load(out / "state.pt", map_location="cpu")["counters"])

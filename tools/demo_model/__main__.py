"""Make the demo checkpoint from nothing: vocabulary, training, export, scores, model card."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

from .card import Run, write_card
from .export import export
from .score import score, show
from .train import train


def machine() -> str:
    """Name the kind of machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {len(names)} CPUs"


def main() -> None:
    """Train (or go on training) in OUT and write OUT/checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the run; a run that was stopped goes on")
    parser.add_argument("--minutes", type=float, default=187, help="time to train")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="training processes on the CPU, one thread each")
    parser.add_argument("--start", type=Path, help="go on from the weights and vocabulary of this checkpoint")
    parser.add_argument("--polish", action="store_true", help="with --start: a short run at a low rate")
    parser.add_argument("--count", type=int, default=50, help="prompts for each skill and mode in the score")
    args = parser.parse_args()
    counters = train(args.out, args.minutes, args.seed, args.workers, args.start, args.polish)
    folder = args.out / "checkpoint"
    export(args.out / "state.pt", args.out / "tiktoken.model", folder)
    scores = score(folder, seed=2026, count=args.count)
    start = f" --start {args.start}{' --polish' * args.polish}" if args.start else ""
    command = f"python -m tools.demo_model OUT --minutes {args.minutes:g} --seed {args.seed}{start}"
    origin = f"the checkpoint {args.start}" if args.start else "random weights"
    write_card(folder, scores, counters, Run(args.seed, machine(), origin, command))
    show(scores)


if __name__ == "__main__":
    main()

"""The command line of a comparison: what can be asked, and one usage error for what cannot."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bench.peers.exchange import GROUP
from bench.peers.report import OURS

MOST_WIDTH, MOST_EXPERTS, MOST_TOKENS, MOST_THREADS = 65536, 4096, 65536, 4096
PEERS = ("kt", "ggml", "ik")

Value = TypeVar("Value")


def parse(arguments: Sequence[str] | None, about: str) -> argparse.Namespace:
    """Read the arguments; `tokens` and `numerics` are lists. Raises: SystemExit with status 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    width = _number(GROUP, MOST_WIDTH, step=GROUP)
    parser.add_argument("--hidden", type=width, default=7168, metavar="N")
    parser.add_argument("--intermediate", type=width, default=2048, metavar="N")
    parser.add_argument("--experts", type=_number(1, MOST_EXPERTS), default=32, metavar="N")
    parser.add_argument("--top-k", type=_number(1, MOST_EXPERTS), default=8, metavar="N")
    parser.add_argument("--tokens", type=_several(_number(1, MOST_TOKENS)), default="1,4,16,64,256", metavar="N,N,…")
    parser.add_argument(
        "--threads", type=_number(1, MOST_THREADS), metavar="N", help="left out: one for each core at hand"
    )
    parser.add_argument("--rounds", type=_number(1, 10000), default=5, metavar="N")
    parser.add_argument(
        "--numerics",
        type=_several(_ours),
        default=",".join(OURS),
        metavar="NAME,…",
        help=f"ours: {', '.join(OURS)}, or both",
    )
    for name in PEERS:
        parser.add_argument(f"--{name}-python", metavar="PATH", help=f"interpreter that has the package of {name}")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: of the busiest thread; on a busy machine, one thread",
    )
    parser.add_argument("--seed", type=_number(0, 2**63 - 1), default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--output", type=_writable, metavar="FILE", help="also write JSON to this file")
    args = parser.parse_args(arguments)
    if args.top_k > args.experts:
        parser.error(f"argument --top-k: expected at most the {args.experts} experts of the layer, got {args.top_k}")
    return args


def _number(low: int, high: int, *, step: int = 1) -> Callable[[str], int]:
    """Make a reader of whole numbers in decimal digits."""
    multiple = f", a multiple of {step}" if step > 1 else ""

    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,19}", text) or not low <= int(text) <= high or int(text) % step:
            raise argparse.ArgumentTypeError(f"expected a number {low}..{high}{multiple}, got {text!r}")
        return int(text)

    return read


def _several(read: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Make a reader of values with commas between them."""
    return lambda text: [read(part.strip()) for part in text.split(",")]


def _ours(name: str) -> str:
    if name not in OURS:
        raise argparse.ArgumentTypeError(f"expected {' or '.join(OURS)}, got {name!r}")
    return name


def _writable(name: str) -> Path:
    """Refuse a file that could not be written when all is measured; leave none behind that was not there."""
    path, there = Path(name), os.path.lexists(name)
    try:
        with open(path, "a", encoding="utf-8"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a file that can be written, got {error.strerror}: {name!r}"
        ) from None
    return path

"""How work is arranged on this machine, measured once in some tenths of a second and remembered (`remembered.py`).

Results do not depend on the tuning, the speed does.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hybrid_k2.experts.remembered import cache_folder, recall, remember
from hybrid_k2.host.cpu import cpu_model

MAX_PREFETCH = 1 << 16
NO_TILES = 65  # no kernel takes more than 64 tokens in a call
MAX_TOKEN_COST = 1000.0


@dataclass(frozen=True)
class Tuning:
    """Say how the kernels go about a call, and what a token costs beside a read of the weights.

    streams: address streams of a one-token call, 1, 2 or 4. prefetch_one, prefetch_many: bytes ahead of its reads that
    a call of one token, or of more, asks for; 0: it does not. tiles_from: tokens of an expert from which kernels that
    have tile instructions (AMX) use them. token_cost: time of one more token where multiplying is
    the limit, in reads of the weights by one thread among all.
    Raises: ValueError for values that no kernel takes.
    """

    streams: int
    prefetch_one: int
    prefetch_many: int
    tiles_from: int
    token_cost: float

    def __str__(self) -> str:
        return (
            f"{self.streams} streams, prefetch {self.prefetch_one} B at one token, {self.prefetch_many} B at more, "
            f"a token costs {self.token_cost:.2f} reads"
        )

    def __post_init__(self) -> None:
        if type(self.streams) is not int or self.streams not in (1, 2, 4):
            raise ValueError(f"streams: expected 1, 2 or 4, got {self.streams!r}")
        for name in ("prefetch_one", "prefetch_many"):
            ahead = getattr(self, name)
            if type(ahead) is not int or not 0 <= ahead <= MAX_PREFETCH:
                raise ValueError(f"{name}: expected 0..{MAX_PREFETCH}, got {ahead!r}")
        if type(self.tiles_from) is not int or not 1 <= self.tiles_from <= NO_TILES:
            raise ValueError(f"tiles_from: expected 1..{NO_TILES}, got {self.tiles_from!r}")
        cost = self.token_cost
        if type(cost) is not float or not 0 < cost <= MAX_TOKEN_COST:
            raise ValueError(f"token_cost: expected a number above 0, at most {MAX_TOKEN_COST}, got {cost!r}")


def remembered_tuning(key: str, measure: Callable[[], Tuning], folder: Path | None = None) -> Tuning:
    """Return the tuning that was measured for this key before, or measure it and remember it.

    Effects: writes one small file into `folder` (by default the user's cache); where that fails, nothing is remembered.
    """
    file = (folder or cache_folder()) / f"tuning-{file_name(key)}.json"
    tuning = _read(file, key)
    if tuning is None:
        tuning = measure()
        remember(file, key, {"tuning": asdict(tuning)})
    return tuning


def machine_key(isa: str, numerics: str, threads: int, nodes: int) -> str:
    """Name what a tuning depends on: the CPU, the kernels and how many threads share the memory."""
    name = cpu_model() or platform.processor() or platform.machine()
    return f"{name}, {isa}, {numerics}, {threads} threads on {nodes} nodes"


def file_name(key: str) -> str:
    """Write a key in letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")


def _read(file: Path, key: str) -> Tuning | None:
    found = recall(file, key)
    try:
        return Tuning(**found["tuning"]) if found is not None else None
    except (ValueError, LookupError, TypeError):
        return None

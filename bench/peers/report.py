"""The result of a comparison as a table, as JSON, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

OURS = ("exact", "fast")
LEVEL = 1.05  # times that are closer than this count as equal


@dataclass(frozen=True)
class Result:
    """What one contender took for one number of tokens, medians over rounds.

    Units: ms per layer; 10^9 operations, or bytes of the touched experts as the checkpoint stores them, per second;
    shares of 1.
    share_of_read: None where times are processor time, for the bandwidth is not.
    times_exact, times_fast: its time over ours in the same round; None where ours is missing.
    """

    tokens: int
    contender: str
    ms: float
    gbps: float
    gops: float
    distinct_experts: int
    share_of_read: float | None
    error: float
    times_exact: float | None
    times_fast: float | None


@dataclass
class Samples:
    """Collect the rounds of one number of tokens."""

    tokens: int
    expert_bytes: int
    operations: float
    distinct: list[int] = field(default_factory=list)
    read_gbps: list[float] = field(default_factory=list)
    rounds: list[dict[str, float]] = field(default_factory=list)  # contender -> seconds
    errors: dict[str, float] = field(default_factory=dict)

    def results(self) -> list[Result]:
        """Sum up, in the order in which contenders first appear."""
        return [self._result(name) for name in dict.fromkeys(name for seconds in self.rounds for name in seconds)]

    def _result(self, name: str) -> Result:
        took = [seconds[name] for seconds in self.rounds if name in seconds]
        seconds, distinct = median(took), round(median(self.distinct))
        gbps = distinct * self.expert_bytes / seconds / 1e9
        return Result(
            tokens=self.tokens,
            contender=name,
            ms=seconds * 1e3,
            gbps=gbps,
            gops=self.operations / seconds / 1e9,
            distinct_experts=distinct,
            share_of_read=gbps / median(self.read_gbps) if self.read_gbps else None,
            error=self.errors[name],
            times_exact=self._over(name, "exact"),
            times_fast=self._over(name, "fast"),
        )

    def _over(self, name: str, ours: str) -> float | None:
        ratios = [seconds[name] / seconds[ours] for seconds in self.rounds if name in seconds and ours in seconds]
        return median(ratios) if ratios else None


@dataclass(frozen=True)
class Report:
    """Everything that a run found out."""

    machine: Mapping[str, Any]
    sizes: Mapping[str, Any]
    rounds: int
    clock: str
    raw_read_gbps: float | None
    contenders: Mapping[str, Mapping[str, Any]]
    skipped: Mapping[str, str]
    results: tuple[Result, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def table(self) -> str:
        """Write the figures as aligned text."""
        lines = [
            f"{self.machine['cpu']}, {self.machine['threads']} threads; {self._limit()}",
            "tokens  experts  contender          ms    GB/s  of the read    GOPS  over exact  over fast    error",
        ]
        for r in self.results:
            lines.append(
                f"{r.tokens:>6} {r.distinct_experts:>8}  {r.contender:<10} {r.ms:>10.2f} {r.gbps:>7.1f}"
                f" {_share(r.share_of_read):>12} {r.gops:>7.0f} {_times(r.times_exact):>11} {_times(r.times_fast):>10}"
                f"  {r.error:.1e}"
            )
        return "\n".join(lines + self.verdicts() + [f"skipped {name}: {why}" for name, why in self.skipped.items()])

    def verdicts(self) -> list[str]:
        """Say for each number of tokens who is fastest, and how ours stand beside the fastest peer."""
        return [_verdict([r for r in self.results if r.tokens == tokens]) for tokens in self._tokens()]

    def _limit(self) -> str:
        if self.raw_read_gbps is None:
            return "times are processor time"
        return f"raw read {self.raw_read_gbps:.1f} GB/s"

    def _tokens(self) -> list[int]:
        return list(dict.fromkeys(r.tokens for r in self.results))


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _verdict(results: list[Result]) -> str:
    """Compare our numerics with the fastest peer. The ratios are medians of rounds, so they may differ from the ms."""
    tokens = results[0].tokens
    where = f"{tokens} token{'s' if tokens > 1 else ''}"
    peers = [r for r in results if r.contender not in OURS]
    if not peers:
        return f"{where}: no peer to compare with"
    best = min(peers, key=lambda r: r.ms)
    parts = [
        _stand(ours, ratio) for ours, ratio in zip(OURS, (best.times_exact, best.times_fast), strict=True) if ratio
    ]
    return f"{where}: against {best.contender}, the fastest peer, " + ", ".join(parts)


def _stand(ours: str, ratio: float) -> str:
    if ratio >= LEVEL:
        return f"{ours} wins by {ratio:.2f}x"
    if ratio <= 1 / LEVEL:
        return f"{ours} loses by {1 / ratio:.2f}x"
    return f"{ours} is level"

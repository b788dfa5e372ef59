"""Draw what `hybrid-k2 bench experts --json` measured: share of the floor against tokens, per numerics and ISA.

    hybrid-k2 bench experts --numerics exact,fast --tokens 1,2,4,8,16,64,256 --json > run.json
    python bench/roofline.py run.json --title "Zen 3, 2 cores, 2026-11-25" --out docs/roofline.svg

Needs matplotlib (`pip install hybrid-k2[bench]`). Several files make several sets of lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit("error: roofline: expected matplotlib, got none installed\nhint: pip install '.[bench]'")

matplotlib.use("svg")
from matplotlib import pyplot as plt

STYLES = {"exact": "-", "fast": "--", "bf16": ":"}


def lines_of(report: dict[str, Any]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Return (tokens, share of the floor) in ascending tokens for each (isa, numerics)."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for result in report["results"]:
        lines.setdefault((result["isa"], result["numerics"]), []).append((result["tokens"], result["share_of_floor"]))
    return {name: sorted(points) for name, points in lines.items()}


def draw(reports: list[dict[str, Any]], title: str, out: Path) -> None:
    """Write the chart as SVG."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for report in reports:
        for (isa, numerics), points in lines_of(report).items():
            tokens, shares = zip(*points, strict=True)
            axes.plot(
                tokens,
                [100 * share for share in shares],
                STYLES.get(numerics, "-."),
                marker="o",
                label=f"{isa}, {numerics}; peak {report['peak_gops'][numerics]:.0f} GOPS",
            )
    raw = ", ".join(f"{report['raw_read_gbps']:.1f}" for report in reports)
    axes.set(
        xscale="log",
        xlabel="tokens of the batch",
        ylabel="share of max(bytes / bandwidth, operations / peak), %",
        ylim=(0, 105),
        title=f"{title}\nraw read {raw} GB/s",
    )
    ticks = sorted({result["tokens"] for report in reports for result in report["results"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--title", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw([json.loads(path.read_text(encoding="utf-8")) for path in args.reports], args.title, args.out)


if __name__ == "__main__":
    main()

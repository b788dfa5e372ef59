"""The command `doctor`: all checks in their order, a line each as soon as it is known."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid_k2 import __version__
from hybrid_k2.cli.exits import FAILED as EXIT_FAILED
from hybrid_k2.cli.exits import ends_cleanly
from hybrid_k2.cli.interrupts import leaving_at_once
from hybrid_k2.cli.terminal import Output

if TYPE_CHECKING:
    from hybrid_k2.cli.doctor.finding import Finding

COLUMN, LEAST_WIDTH = 20, 40  # where texts begin, and how wide they are at least
STYLES = {"ok": "", "warning": "warning", "failed": "error"}


@ends_cleanly
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="PATH_OR_REPO_ID", help="A checkpoint to check, too, before it is loaded."),
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option("--rules", metavar="FILE|NAME", help="Placement rules for it (left out: chosen for the machine)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine and installation: what they can do, and whether it works."""
    if rules is not None and (model is None or not rules.strip()):
        expected = "a checkpoint beside it" if model is None else "a rule file or a name, got an empty text"
        raise typer.BadParameter(f"expected {expected}", param_hint="--rules")
    out, findings = Output(sys.stdout), []
    for finding in _all(model, rules):
        findings.append(finding)
        if not as_json:
            _show(finding, out)
    healthy = all(finding.status != "failed" for finding in findings)
    if as_json:
        values = {"version": __version__, "healthy": healthy, "findings": [asdict(finding) for finding in findings]}
        out.line(json.dumps(values, ensure_ascii=False, indent=2))
    if not healthy:
        raise typer.Exit(EXIT_FAILED)


def _all(model: str | None, rules: str | None) -> Iterator[Finding]:
    with leaving_at_once():
        import platform

        import torch

        from hybrid_k2.cli.doctor.extras import check_extras
        from hybrid_k2.cli.doctor.finding import OK, Finding, look
        from hybrid_k2.cli.doctor.gpu import check_gpus
        from hybrid_k2.cli.doctor.host import check_bandwidth, check_cpu, check_memory
        from hybrid_k2.cli.doctor.kernels import check_kernels
        from hybrid_k2.cli.doctor.model import check_demo, check_model
        from hybrid_k2.placement import Machine

    software = f"hybrid-k2 {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    yield Finding("software", OK, software)
    machine = Machine.probe()
    yield from look("cpu", partial(check_cpu, machine))
    yield from look("kernels", check_kernels)
    yield from look("memory", partial(check_memory, machine))
    yield from look("bandwidth", partial(check_bandwidth, machine))
    yield from look("gpu", partial(check_gpus, machine))
    yield from look("extras", partial(check_extras, machine))
    yield from look("demo model", check_demo)
    if model is not None:
        yield from look("checkpoint", partial(check_model, model, rules))


def _show(finding: Finding, out: Output) -> None:
    status = finding.status.upper() if finding.status == "failed" else finding.status
    out.write(f"{status:<8}", STYLES[finding.status])
    out.line(f"{finding.name:<12}{_in_column(finding.text, out)}")
    if finding.hint:
        out.line(f"{'':<{COLUMN}}{_in_column(finding.hint, out)}", "dim")


def _in_column(text: str, out: Output) -> str:
    """Break a text for a terminal; elsewhere a line stays a line."""
    if not out.tty:
        return " ".join(text.split())
    width = max(LEAST_WIDTH, out.width - COLUMN)
    return f"\n{'':<{COLUMN}}".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))

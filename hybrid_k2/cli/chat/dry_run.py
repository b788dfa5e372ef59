"""`chat --dry-run`: the plan alone, on stdout; no weight is read, and none need be here."""

from __future__ import annotations

import json
from pathlib import Path

from hybrid_k2.cli.interrupts import leaving_at_once
from hybrid_k2.cli.terminal import Output
from hybrid_k2.placement.plan_json import plan_values


def show_plan(
    model: str, rules: str | None, trace: Path | None, host_memory_bytes: int | None, output: Output, as_json: bool
) -> None:
    """Print the plan that loading would obey.

    Raises: HybridK2Error: everything that is wrong with the configuration, the rules, the machine or the trace's file.
    """
    with leaving_at_once():
        from hybrid_k2.accelerator import check_trace_file
        from hybrid_k2.engine.loading import plan_checkpoint

    if trace is not None:
        check_trace_file(trace)
    plan = plan_checkpoint(model, rules, host_memory_bytes=host_memory_bytes)
    if as_json:
        output.line(json.dumps(plan_values(plan), ensure_ascii=False, indent=2))
        return
    output.line(f"rules: {plan.rules.reason or f'{plan.rules.source} (as asked)'}")
    output.line(plan.table())

"""`chat --dry-run`: the plan alone, on stdout; no weight is read, and none need be here."""

from __future__ import annotations

import json

from hybrid_k2.cli.interrupts import leaving_at_once
from hybrid_k2.cli.terminal import Output
from hybrid_k2.errors import ConfigError
from hybrid_k2.placement.plan_json import plan_values
from hybrid_k2.placement.sizes import try_parse_bytes


def show_plan(model: str, rules: str | None, host_memory: str | None, output: Output, as_json: bool) -> None:
    """Print the plan that loading would obey.

    Raises: HybridK2Error: everything that is wrong with the configuration, the rules or the machine.
    """
    host_memory_bytes = _read_size(host_memory)  # before the imports, which take seconds
    with leaving_at_once():
        from hybrid_k2.engine.loading import plan_checkpoint

    plan = plan_checkpoint(model, rules, host_memory_bytes=host_memory_bytes)
    if as_json:
        output.line(json.dumps(plan_values(plan), ensure_ascii=False, indent=2))
        return
    output.line(f"rules: {plan.rules.reason or f'{plan.rules.source} (as asked)'}")
    output.line(plan.table())


def _read_size(text: str | None) -> int | None:
    if text is None:
        return None
    size = try_parse_bytes(text)
    if not size:
        raise ConfigError(f"--host-memory: expected a size with its unit, as 768GiB, got {text!r}")
    return size

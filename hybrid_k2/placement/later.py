"""What can be planned and not yet loaded: the one list."""

from __future__ import annotations

from collections.abc import Iterator

from hybrid_k2.placement.memories import HOST, memory_of
from hybrid_k2.placement.plan import Plan
from hybrid_k2.placement.yaml_tree import fail

_Part = tuple[int | None, str]  # the line in the rules, and what stands there


def missing_parts(plan: Plan) -> tuple[_Part, ...]:
    """List what this plan has and this version cannot load, each with its line in the rules."""
    return tuple(_missing(plan))


def check_loadable(plan: Plan) -> None:
    """Refuse a plan that this version cannot load. Raises: RulesError naming the first part."""
    for line, part in missing_parts(plan):
        fail(plan.rules.source, line, f"{part} is not available in this version")


def _missing(plan: Plan) -> Iterator[_Part]:
    for row in plan.rows:
        if row.hottest:
            yield row.line, "hottest experts on a GPU"
        elif memory_of(row.device) != HOST and row.dtype in ("int8", "fp8"):
            yield row.line, f"dtype: {row.dtype} on a GPU"
    if plan.stream != "off":
        yield plan.rules.prefill.stream_line, "prefill: stream: auto"

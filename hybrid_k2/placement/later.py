"""What can be planned and not yet loaded: the one list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hybrid_k2.placement.plan import Plan
from hybrid_k2.placement.yaml_tree import fail


class MissingPart(NamedTuple):
    """Name what a plan has and this version cannot load: its line in the rules, and how to do without."""

    line: int | None
    what: str
    hint: str


def missing_parts(plan: Plan) -> tuple[MissingPart, ...]:
    """List what this plan has and this version cannot load."""
    return tuple(_missing(plan))


def check_loadable(plan: Plan) -> None:
    """Refuse a plan that this version cannot load. Raises: RulesError naming the first part."""
    for part in missing_parts(plan):
        fail(plan.rules.source, part.line, f"{part.what} is not available in this version", part.hint)


def _missing(plan: Plan) -> Iterator[MissingPart]:
    if plan.stream != "off":
        yield MissingPart(plan.rules.prefill.stream_line, "prefill: stream: auto", "write stream: off")

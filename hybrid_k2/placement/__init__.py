"""Placement: rules × model × machine → the plan that says where every tensor lives."""

from __future__ import annotations

from hybrid_k2.placement.described import described_gpu, described_host
from hybrid_k2.placement.draft import NO_SELF_CHECK, make_plan
from hybrid_k2.placement.machine import Gpu, Machine
from hybrid_k2.placement.plan import KvCachePlan, Placement, Plan, PlanRow
from hybrid_k2.placement.rules import Rules, default_rules, load_rules, parse_rules, shipped_names, shipped_rules

__all__ = [
    "NO_SELF_CHECK",
    "Gpu",
    "KvCachePlan",
    "Machine",
    "Placement",
    "Plan",
    "PlanRow",
    "Rules",
    "default_rules",
    "described_gpu",
    "described_host",
    "load_rules",
    "make_plan",
    "parse_rules",
    "shipped_names",
    "shipped_rules",
]

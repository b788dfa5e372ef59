"""The plan as values that JSON has: for programs, where `table` is for people. Sizes are bytes."""

from __future__ import annotations

from typing import Any

from hybrid_k2.placement.budget import find_budget
from hybrid_k2.placement.plan import Plan


def plan_values(plan: Plan) -> dict[str, Any]:
    """Return everything that the table says."""
    cache = plan.kv_cache
    return {
        "model": plan.config.model_type,
        "layers": plan.config.num_hidden_layers,
        "rules": plan.rules.source,
        "devices": {device: _device(plan, device) for device in plan.devices},
        "groups": [
            {
                "what": row.what,
                "hottest": row.hottest,
                "also_on_host": row.also_on_host,
                "layers": row.layer_text or None,
                "device": row.device,
                "dtype": row.dtype,
                "bytes": row.nbytes,
                "line": row.line or None,
            }
            for row in plan.rows
        ],
        "kv_cache": {
            "device": cache.device,
            "dtype": cache.dtype,
            "tokens": cache.tokens,
            "page_tokens": cache.page_tokens,
            "bytes": cache.nbytes,
        },
        "overheads": [{"what": one.what, "device": one.device, "bytes": one.nbytes} for one in plan.overheads],
        "numerics": plan.numerics,
        "activation_dtype": plan.activation_dtype,
        "nodes": [{"threads": node.threads, "node": node.node} for node in plan.nodes],
        "accelerator": plan.accelerator,
        "twin_threads": plan.twin_threads,
        "overlap": plan.overlap,
        "deferred": plan.deferred,
        "stream": plan.stream,
        "graphs": "auto" if plan.graphs else "off",
        "chunk_tokens": plan.chunk_tokens,
        "self_check": plan.self_check,
        "bytes_per_token": plan.bytes_per_token,
        "notes": list(plan.notes),
    }


def _device(plan: Plan, device: str) -> dict[str, Any]:
    budget = find_budget(device, plan.rules, plan.machine)
    return {
        "bytes": plan.bytes_on(device),
        "budget": budget.nbytes,
        "budget_is": budget.origin,
        "bytes_per_token": plan.bytes_per_token_on(device),
    }

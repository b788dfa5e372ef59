"""The routes that tell how the server is doing, as JSON: what the web page's status view shows."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from hybrid_k2 import __version__
from hybrid_k2.placement import Plan
from hybrid_k2.placement.plan_json import plan_values
from hybrid_k2.server.context import Context
from hybrid_k2.server.errors import json_response

# Of the plan; the rest names files of this machine, or is about planning.
_PLAN = (
    "layers",
    "devices",
    "groups",
    "kv_cache",
    "overheads",
    "numerics",
    "activation_dtype",
    "nodes",
    "accelerator",
    "twin_threads",
    "overlap",
    "deferred",
    "stream",
    "graphs",
    "chunk_tokens",
    "bytes_per_token",
)


def status_routes(context: Context) -> APIRouter:
    """Return the routes."""
    router = APIRouter()
    started = time.monotonic()

    @router.get("/v1/hybrid-k2/status")
    async def get_status() -> Response:
        """Tell what is loaded and where it lies, what runs and waits, and what the caches did."""
        served = context.backend.served
        read, total = context.backend.loading_progress
        content: dict[str, Any] = {
            "state": context.backend.state,
            "version": __version__,
            "model": context.options.model_names[0],
            "uptime_s": round(time.monotonic() - started, 3),
            "loading": {"read_bytes": read, "total_bytes": total},
            "context_tokens": None,
            "service": None,
            "plan": None,
        }
        if served is not None:
            content["context_tokens"] = served.model.context_tokens
            content["service"] = asdict(served.service.stats())
            content["plan"] = _plan(served.model.plan)
        return json_response(content)

    @router.get("/v1/hybrid-k2/experts")
    async def get_experts() -> Response:
        """Tell how often each expert was chosen: lists by layer, of a number for each expert."""
        model = context.backend.ready().model
        uses = await asyncio.to_thread(model.expert_use)
        return json_response(
            {
                "layers": list(uses),
                "counts": [use.counts for use in uses.values()],
                "hot": [use.hot for use in uses.values()],
            }
        )

    return router


def _plan(plan: Plan) -> dict[str, Any]:
    values = plan_values(plan)
    return {name: values[name] for name in _PLAN}

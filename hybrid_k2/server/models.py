"""The routes that tell about the server: models, health, metrics, the count of a prompt's tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hybrid_k2 import __version__
from hybrid_k2.errors import ContextLengthError
from hybrid_k2.protocol import canonical_history, encode_chat, expand_builtins
from hybrid_k2.server.backend import Model
from hybrid_k2.server.body import AnyObject, Body, body_schema, read_body
from hybrid_k2.server.context import Context
from hybrid_k2.server.conversation import check_messages, check_tools
from hybrid_k2.server.errors import json_response
from hybrid_k2.server.thinking import Thinking, read_thinking

Messages = Sequence[Mapping[str, Any]]
COUNTED_CONTEXTS = 4  # more tokens are not counted: that takes long, and helps nobody to shorten a prompt


class EstimateRequest(Body):
    """The body of a request that counts tokens."""

    messages: list[Any]
    model: str | None = None
    tools: list[Any] | None = None
    thinking: AnyObject = None


def model_routes(context: Context) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """Say whether requests are taken: 200, or 503 while the model loads and while the server drains."""
        state = context.backend.state
        content: dict[str, Any] = {"status": "ok" if state == "ready" else state, "version": __version__}
        if state == "loading":
            read, total = context.backend.loading_progress
            content["progress"] = {
                "read_bytes": read,
                "total_bytes": total,
                "share": round(read / total, 4) if total else 0.0,
            }
        return json_response(content, 200 if state == "ready" else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Give the figures for Prometheus."""
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def list_models() -> Response:
        """List the names under which the model is served."""
        return json_response(
            {"object": "list", "data": [_model(context, name) for name in context.options.model_names]}
        )

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        """Describe one model."""
        return json_response(_model(context, context.check_model(name)))

    @router.post("/v1/tokenizers/estimate-token-count", openapi_extra=body_schema(EstimateRequest))
    async def estimate_token_count(request: Request) -> Response:
        """Count the tokens of a prompt, as a chat request would have them."""
        body = await read_body(request, EstimateRequest)
        context.check_model(body.model)
        messages, tools, thinking = await asyncio.to_thread(_check_estimate, body, context)
        count = await count_tokens(request, context, messages, tools, thinking)
        return json_response({"code": 0, "data": {"total_tokens": count}, "status": True})

    return router


def _check_estimate(body: EstimateRequest, context: Context) -> tuple[Messages, Messages, Thinking]:
    limits = context.options.limits
    return check_messages(body.messages, limits), check_tools(body.tools, limits), read_thinking(body.thinking)


async def count_tokens(
    request: Request, context: Context, messages: Messages, tools: Messages, thinking: Thinking
) -> int:
    """Count the tokens of a conversation as the engine will encode it, up to some contexts.

    Raises: ApiError, RequestError, ClientGoneError.
    """
    model = context.backend.ready().model
    most = COUNTED_CONTEXTS * model.context_tokens
    messages = await context.images.read_messages(request, messages, model.images, most)
    return await asyncio.to_thread(_count_tokens, model, messages, tools, thinking, most)


def _count_tokens(model: Model, messages: Messages, tools: Messages, thinking: Thinking, most: int) -> int:
    messages, _ = canonical_history(messages)
    declared = expand_builtins(tools, thinking.on)
    ids, _ = encode_chat(
        model.tokenizer, messages, declared, thinking.on, thinking.keep, images=model.images, most=most
    )
    if (count := len(ids)) > most:
        raise ContextLengthError(f"messages: expected at most {most} tokens to count, got {count} or more")
    return count


def _model(context: Context, name: str) -> dict[str, Any]:
    served = context.backend.served
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "hybrid-k2",
        "root": context.options.model_names[0],
        "context_length": served.model.context_tokens if served else None,
        "max_model_len": served.model.context_tokens if served else None,
        "supports_reasoning": True,
        "supports_image_in": served is not None and served.model.images is not None,
        "supports_video_in": False,
    }

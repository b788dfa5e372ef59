"""The route `/v1/responses`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hybrid_k2.server.answer import answer_chat
from hybrid_k2.server.body import apart, body_schema, read_body
from hybrid_k2.server.chat import Chat
from hybrid_k2.server.context import Context
from hybrid_k2.server.conversation import check_messages, check_tools, read_tool_choice
from hybrid_k2.server.errors import in_words_of
from hybrid_k2.server.openai_usage import new_id
from hybrid_k2.server.responses_reply import response_events
from hybrid_k2.server.responses_request import OWN_NAMES, ResponsesRequest
from hybrid_k2.server.run import Run
from hybrid_k2.server.sse import frame


def check_response_chat(body: ResponsesRequest, context: Context) -> Chat:
    """Check everything that needs no model. Raises: ApiError."""
    limits = context.options.limits
    body.check_fixed()
    tools = check_tools(body.chat_tools(), limits)
    return Chat(
        messages=check_messages(body.chat_messages(), limits),
        tools=tools,
        tool_choice=read_tool_choice(body.chat_tool_choice(), tools),
        parallel=body.parallel_tool_calls,
        thinking=body.read_thinking(),
        sampling=body.sampling(),
        max_tokens=body.max_output_tokens,
        logprobs=body.top_k_logprobs(),
        response_format=body.response_format(),
        salt=body.cache_salt,
    )


def response_routes(context: Context) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/responses", openapi_extra=body_schema(ResponsesRequest))
    async def create_response(request: Request) -> Response:
        """Answer a conversation."""
        with in_words_of(OWN_NAMES):
            body = await read_body(request, ResponsesRequest)
            model = context.check_model(body.model)
            chat = await apart(request, partial(check_response_chat, body, context))
            head, with_logprobs = _head(body, model), chat.logprobs is not None

            async def frames(run: Run) -> AsyncGenerator[bytes, None]:
                async for event in response_events(head, run, with_logprobs, failing=True):
                    yield frame(event, event["type"])

            async def whole(run: Run) -> Any:
                response = None
                async for event in response_events(head, run, with_logprobs):
                    response = event.get("response")
                return response

            return await answer_chat(request, context, chat, stream=body.stream, frames=frames, whole=whole)

    return router


def _head(body: ResponsesRequest, model: str) -> dict[str, Any]:
    """Return the response's fields that are known from the start."""
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
        "service_tier": "default",
        "store": False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}, **(body.text or {})},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "background": False,
        "user": body.user,
    }

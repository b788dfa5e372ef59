"""The routes `/v1/messages` and `/v1/messages/count_tokens`, also under `/anthropic` as Moonshot has them."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hybrid_k2.server.answer import answer_chat
from hybrid_k2.server.anthropic_reply import message, message_frames
from hybrid_k2.server.anthropic_request import OWN_NAMES, MessagesRequest, PromptFields
from hybrid_k2.server.body import apart, body_schema, read_body
from hybrid_k2.server.chat import Chat
from hybrid_k2.server.context import Context
from hybrid_k2.server.conversation import check_messages, check_tools, read_tool_choice
from hybrid_k2.server.errors import in_words_of, json_response
from hybrid_k2.server.models import Messages, count_tokens
from hybrid_k2.server.openai_usage import new_id
from hybrid_k2.server.run import Run


def check_message_chat(body: MessagesRequest, context: Context) -> Chat:
    """Check everything that needs no model. Raises: ApiError."""
    limits = context.options.limits
    body.check_fixed()
    tools = check_tools(body.chat_tools(), limits)
    choice, parallel = body.chat_tool_choice()
    return Chat(
        messages=check_messages(body.chat_messages(), limits),
        tools=tools,
        tool_choice=read_tool_choice(choice, tools),
        parallel=parallel,
        thinking=body.read_thinking(),
        sampling=body.sampling(),
        max_tokens=body.max_tokens,
        response_format=body.response_format(),
    )


def message_routes(context: Context) -> APIRouter:
    """Return the routes of messages."""
    router = APIRouter()

    @router.post("/anthropic/v1/messages", openapi_extra=body_schema(MessagesRequest))
    @router.post("/v1/messages", openapi_extra=body_schema(MessagesRequest))
    async def create_message(request: Request) -> Response:
        """Answer a conversation."""
        with in_words_of(OWN_NAMES):
            body = await read_body(request, MessagesRequest)
            model = context.check_model(body.model)
            chat = await apart(request, partial(check_message_chat, body, context))
            message_id = new_id("msg_")

            async def whole(run: Run) -> dict[str, Any]:
                (reply,) = await run.replies()
                return message(message_id, model, reply)

            frames = partial(message_frames, message_id, model)
            return await answer_chat(request, context, chat, stream=body.stream, frames=frames, whole=whole)

    @router.post("/anthropic/v1/messages/count_tokens", openapi_extra=body_schema(PromptFields))
    @router.post("/v1/messages/count_tokens", openapi_extra=body_schema(PromptFields))
    async def count_message_tokens(request: Request) -> Response:
        """Count the tokens of a prompt."""
        with in_words_of(OWN_NAMES):
            body = await read_body(request, PromptFields)
            context.check_model(body.model)
            messages, tools = await asyncio.to_thread(check_prompt, body, context)
            count = await count_tokens(request, context, messages, tools, body.read_thinking())
            return json_response({"input_tokens": count})

    return router


def check_prompt(body: PromptFields, context: Context) -> tuple[Messages, Messages]:
    """Return the messages and tools of the prompt that a message would have. Raises: ApiError."""
    limits = context.options.limits
    body.check_fixed()
    return check_messages(body.chat_messages(), limits), check_tools(body.chat_tools(), limits)

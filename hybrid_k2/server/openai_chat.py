"""The route `/v1/chat/completions`."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from hybrid_k2.engine.params import MAX_LOGPROBS
from hybrid_k2.errors import shown
from hybrid_k2.server import moonshot
from hybrid_k2.server.answer import answer_chat
from hybrid_k2.server.body import AnyObject, apart, body_schema, read_body
from hybrid_k2.server.chat import Chat
from hybrid_k2.server.chat_reply import ReplyForm, chat_completion, chat_frames
from hybrid_k2.server.context import Context
from hybrid_k2.server.conversation import check_messages, check_tools, read_tool_choice
from hybrid_k2.server.errors import bad_request
from hybrid_k2.server.openai_usage import new_id
from hybrid_k2.server.run import Run
from hybrid_k2.server.sampling import CacheSalt, SamplingFields, StreamOptions
from hybrid_k2.server.thinking import read_thinking

Effort = Annotated[Any, WithJsonSchema({"type": "string"})]


class ChatRequest(SamplingFields):
    """The body of a chat request."""

    messages: list[Any]
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: AnyObject = None
    thinking: AnyObject = None
    reasoning_effort: Effort = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_progress: bool = False
    cache_salt: CacheSalt = ""
    # Names for the client's own books, without effect on the reply.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    # Fields with one value that this server can give.
    store: bool = False
    service_tier: str = "auto"
    modalities: list[str] | None = None
    verbosity: str = "medium"

    def check_fixed(self) -> None:
        """Refuse what this server does not do. Raises: ApiError."""
        if self.store:
            raise bad_request("store", "expected false: this server keeps no replies, got true")
        if self.service_tier not in ("auto", "default"):
            raise bad_request("service_tier", f"expected auto or default, got {shown(self.service_tier)}")
        if self.modalities not in (None, ["text"]):
            raise bad_request("modalities", f'expected ["text"], got {shown(self.modalities)}')
        if self.verbosity != "medium":
            raise bad_request("verbosity", f"expected medium, the only one, got {shown(self.verbosity)}")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options", "expected stream = true beside it")
        if self.return_progress and not self.stream:
            raise bad_request("return_progress", "expected stream = true beside it")

    def longest(self) -> int | None:
        """Return the most tokens that the reply may have. Raises: ApiError."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise bad_request("max_tokens", "expected it to equal max_completion_tokens, or only one of them")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def top_k_logprobs(self) -> int | None:
        """Return how many alternatives of each token to report; None for no log probabilities. Raises: ApiError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs", "expected logprobs = true beside it")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise bad_request("top_logprobs", f"expected 0 to {MAX_LOGPROBS}, got {shown(self.top_logprobs)}")
        return (self.top_logprobs or 0) if self.logprobs else None


def check_chat(body: ChatRequest, context: Context) -> Chat:
    """Check everything that needs no model. Raises: ApiError."""
    limits = context.options.limits
    body.check_fixed()
    body.check_choices(limits)
    tools = check_tools(body.tools, limits)
    chat = Chat(
        messages=check_messages(body.messages, limits),
        tools=tools,
        tool_choice=read_tool_choice(body.tool_choice, tools),
        parallel=body.parallel_tool_calls,
        thinking=read_thinking(body.thinking, body.reasoning_effort, body.enable_thinking, body.chat_template_kwargs),
        sampling=body,
        max_tokens=body.longest(),
        logprobs=body.top_k_logprobs(),
        response_format=body.response_format,
        salt=body.cache_salt,
    )
    if context.options.strict_moonshot:
        moonshot.check(chat)
    return chat


def chat_routes(context: Context) -> APIRouter:
    """Return the routes of chats."""
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        body = await read_body(request, ChatRequest)
        model = context.check_model(body.model)
        chat = await apart(request, partial(check_chat, body, context))
        form = ReplyForm(
            id=new_id("chatcmpl-"),
            model=model,
            created=int(time.time()),
            choices=body.n,
            logprobs=chat.logprobs is not None,
            usage_frame=body.stream_options is not None and body.stream_options.include_usage,
            progress=body.return_progress,
            alias=not context.options.strict_moonshot,
        )

        async def whole(run: Run) -> dict[str, Any]:
            return chat_completion(form, await run.replies())

        return await answer_chat(
            request, context, chat, stream=body.stream, frames=partial(chat_frames, form), whole=whole
        )

    return router

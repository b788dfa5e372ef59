"""From a checked chat to its response, in whichever dialect: a stream of frames, or one JSON object."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from hybrid_k2.server.chat import Chat
from hybrid_k2.server.context import Context
from hybrid_k2.server.errors import in_words_of, json_response
from hybrid_k2.server.run import Run, unless_gone
from hybrid_k2.server.sse import SseResponse

_NAMES = {  # what the engine calls them: the prompt that messages become, the grammar of a schema
    "prompt": "messages",
    "schema": "response_format.json_schema.schema",
    "grammar": "response_format",
}


async def answer_chat(
    request: Request,
    context: Context,
    chat: Chat,
    *,
    stream: bool,
    frames: Callable[[Run], AsyncGenerator[bytes, None]],
    whole: Callable[[Run], Awaitable[object]],
) -> Response:
    """Hand a chat to the service, and write what comes back: as `frames`, or `whole` as JSON.

    Raises: ApiError, RequestError before anything is sent; ClientGoneError.
    """
    served = context.backend.ready()
    model = served.model
    messages = await context.images.read_messages(request, chat.messages, model.images, model.context_tokens)
    chat = replace(chat, messages=messages)
    run = Run(served.service, context.metrics, request.state.log)
    build = partial(chat.service_request, model.tokenizer, request.state.owner, context.options.limits)

    async def submit() -> None:
        with in_words_of(_NAMES):
            await run.submit(build)

    if stream:
        await submit()
        return SseResponse(frames(run), run.cancel, context.options.keep_alive_s)

    async def wait() -> Response:
        await submit()
        return json_response(await whole(run))

    return await unless_gone(request, wait())

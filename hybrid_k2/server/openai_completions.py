"""The route `/v1/completions`: text or token ids that the model continues, without the form of a chat."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from hybrid_k2.engine.reply import Reply, TokenLogprob
from hybrid_k2.engine.service_types import Finished, Piece, ServiceRequest
from hybrid_k2.errors import shown
from hybrid_k2.protocol import Tokenizer
from hybrid_k2.server.body import body_schema, read_body
from hybrid_k2.server.context import Context
from hybrid_k2.server.errors import bad_request, json_response
from hybrid_k2.server.openai_usage import new_id, timings, usage
from hybrid_k2.server.run import Run, unless_gone
from hybrid_k2.server.sampling import CacheSalt, SamplingFields, StreamOptions, cache_salt
from hybrid_k2.server.sse import DONE, SseResponse, frame

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_LOGPROBS = 5

Prompt = str | list[int]
Prompts = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class CompletionRequest(SamplingFields):
    """The body of a request for a completion."""

    prompt: Prompts
    model: str | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: CacheSalt = ""
    user: str | None = None

    def prompts(self) -> list[Prompt]:
        """Return the prompts: texts, or lists of token ids, which the engine checks. Raises: ApiError."""
        given = self.prompt
        if isinstance(given, str) or (isinstance(given, list) and given and _are_ids(given)):
            return [given]
        if isinstance(given, list) and given and all(isinstance(one, str) or _are_ids(one) for one in given):
            return given
        raise bad_request("prompt", f"expected a text, token ids, or a list of one of them, got {shown(given)}")

    def check(self) -> None:
        """Refuse what this server does not do. Raises: ApiError."""
        if self.suffix is not None:
            raise bad_request("suffix", "expected none: the model only continues")
        if self.best_of not in (None, self.n):
            raise bad_request("best_of", f"expected n = {self.n}, or nothing, got {shown(self.best_of)}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise bad_request("logprobs", f"expected 0 to {MAX_LOGPROBS}, got {shown(self.logprobs)}")
        if self.logprobs is not None and self.echo:
            raise bad_request("logprobs", "expected echo = false beside it: those of a prompt are not computed")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options", "expected stream = true beside it")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)


def completion_routes(context: Context) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Continue one prompt, or several."""
        body = await read_body(request, CompletionRequest)
        model = context.check_model(body.model)
        body.check()
        prompts = body.prompts()
        body.check_choices(context.options.limits, len(prompts))
        params = body.params(max_tokens=body.max_tokens, logprobs=body.logprobs)
        served = context.backend.ready()
        _check_ids(prompts, served.model.tokenizer.vocab_size)
        runs = [context.run(request) for _ in prompts]
        head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

        def build(prompt: Prompt) -> ServiceRequest:
            owner = request.state.owner
            salt = cache_salt(owner, body.cache_salt)
            return ServiceRequest(prompt=prompt, params=params, key=owner, cache_salt=salt, n=body.n)

        async def submit() -> None:
            try:
                for run, prompt in zip(runs, prompts, strict=True):
                    await run.submit(partial(build, prompt))
            except BaseException:
                cancel()
                raise

        def cancel() -> None:
            for run in runs:
                run.cancel()

        async def whole() -> Response:
            try:
                await submit()
                groups = [await run.replies() for run in runs]
            finally:
                cancel()
            echoes = await asyncio.to_thread(_echoes, body.echo, prompts, served.model.tokenizer)
            choices = [
                _choice(
                    number, echo + reply.content, reply.finish_reason, _logprobs(body, reply.logprobs or (), len(echo))
                )
                for number, (echo, reply) in enumerate(
                    (echo, reply) for echo, group in zip(echoes, groups, strict=True) for reply in group
                )
            ]
            return json_response(
                {**head, "choices": choices, "usage": _usage(groups), "timings": timings(groups[0][0])}
            )

        if not body.stream:
            return await unless_gone(request, whole())
        await submit()
        echoes = await asyncio.to_thread(_echoes, body.echo, prompts, served.model.tokenizer)
        return SseResponse(_frames(head, body, runs, echoes), cancel, context.options.keep_alive_s)

    return router


def _check_ids(prompts: Sequence[Prompt], vocab_size: int) -> None:
    """Refuse token ids that the vocabulary does not have. Raises: ApiError."""
    for number, prompt in enumerate(prompts):
        wrong = [] if isinstance(prompt, str) else [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            place = f"prompt[{number}]" if len(prompts) > 1 else "prompt"
            raise bad_request(place, f"expected token ids from 0 to {vocab_size - 1}, got {shown(wrong[0])}")


async def _frames(
    head: dict[str, Any], body: CompletionRequest, runs: list[Run], echoes: list[str]
) -> AsyncGenerator[bytes, None]:
    """Yield the frames of all choices, in the order in which they come."""
    merged: asyncio.Queue[tuple[int, Piece | Finished] | BaseException] = asyncio.Queue()

    async def read(number: int, run: Run) -> None:
        try:
            async for event in run.events():
                if isinstance(event, (Piece, Finished)):
                    merged.put_nowait((number, event))
        except BaseException as error:
            merged.put_nowait(error)
            raise

    readers = [asyncio.ensure_future(read(number, run)) for number, run in enumerate(runs)]
    groups: list[list[Reply]] = [[] for _ in runs]
    shown_tokens: dict[int, int] = {}
    try:
        for index in range(len(runs) * body.n if body.echo else 0):
            yield frame({**head, "choices": [_choice(index, echoes[index // body.n], None, None)]})
        while sum(map(len, groups)) < len(runs) * body.n:
            got = await merged.get()
            if isinstance(got, BaseException):
                raise got
            number, event = got
            index = number * body.n + event.choice
            if isinstance(event, Piece):
                tokens, text, reason = event.tokens, event.event.text, None
            else:
                groups[number].append(event.reply)
                tokens = (event.reply.logprobs or ())[shown_tokens.get(index, 0) :]
                text, reason = "", event.reply.finish_reason
            shown_tokens[index] = shown_tokens.get(index, 0) + len(tokens)
            yield frame({**head, "choices": [_choice(index, text, reason, _logprobs(body, tokens, 0))]})
        if body.stream_options is not None and body.stream_options.include_usage:
            yield frame({**head, "choices": [], "usage": _usage(groups)})
        yield DONE
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _choice(index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _echoes(echo: bool, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each prompt if it was asked for."""
    return ["" if not echo else prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]


def _logprobs(body: CompletionRequest, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
    """Return the log probabilities in the old form: parallel lists. Offsets count characters of the text."""
    if body.logprobs is None:
        return None
    texts = [_text(token.text_bytes) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{_text(text): logprob for _, text, logprob in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _text(token: bytes) -> str:
    """Return a token's text; bytes that are no whole character are written out, to keep two tokens apart."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _usage(groups: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """Add up the usage of all prompts."""
    counts = [usage(group) for group in groups]
    total: dict[str, Any] = {
        name: sum(count[name] for count in counts)
        for name in ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")
    }
    return total | {"prompt_tokens_details": {"cached_tokens": total["cached_tokens"]}}

"""The route `/v1/completions`: text or token ids that the model continues, without the form of a chat."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hybrid_k2.engine.reply import Reply, TokenLogprob
from hybrid_k2.engine.service_types import Finished, Piece, ServiceRequest
from hybrid_k2.protocol import Tokenizer
from hybrid_k2.server.body import body_schema, read_body
from hybrid_k2.server.completion_request import CompletionRequest, Prompt, check_ids
from hybrid_k2.server.context import Context
from hybrid_k2.server.errors import json_response
from hybrid_k2.server.openai_usage import new_id, timings, usage
from hybrid_k2.server.run import Run, unless_gone
from hybrid_k2.server.sampling import cache_salt
from hybrid_k2.server.sse import DONE, SseResponse, frame


def completion_routes(context: Context) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Continue one prompt, or several."""
        body = await read_body(request, CompletionRequest)
        name = context.check_model(body.model)
        body.check()
        prompts = body.prompts()
        body.check_choices(context.options.limits, len(prompts))
        model = context.backend.ready().model
        check_ids(prompts, model.tokenizer.vocab_size, model.context_tokens)
        completion = Completion(
            body=body,
            head={"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": name},
            prompts=prompts,
            echoes=[_echo(prompt, model.tokenizer) if body.echo else "" for prompt in prompts],
            first_tokens=await asyncio.to_thread(_first_tokens, prompts, model.tokenizer) if body.reads_prompt else [],
            runs=[context.run(request) for _ in prompts],
        )
        if not body.stream:
            return await unless_gone(request, completion.whole(request.state.owner))
        await completion.submit(request.state.owner)
        return SseResponse(completion.frames(), completion.cancel, context.options.keep_alive_s)

    return router


@dataclass(frozen=True)
class Completion:
    """One request for completions: a run of the service for each prompt, with `n` choices each."""

    body: CompletionRequest
    head: dict[str, Any]  # the fields that begin every object
    prompts: list[Prompt]
    echoes: list[str]  # what goes before each prompt's choices
    first_tokens: list[bytes]  # of each prompt, where their log probabilities are wanted
    runs: list[Run]

    async def submit(self, owner: str) -> None:
        """Hand all prompts to the service, or none. Raises: ApiError, RequestError."""
        body = self.body
        request = partial(
            ServiceRequest,
            params=body.params(max_tokens=body.max_tokens, logprobs=body.logprobs, prompt_logprobs=body.reads_prompt),
            key=owner,
            cache_salt=cache_salt(owner, body.cache_salt),
            n=body.n,
        )
        try:
            for run, prompt in zip(self.runs, self.prompts, strict=True):
                await run.submit(partial(request, prompt=prompt))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Free what the request holds in the service."""
        for run in self.runs:
            run.cancel()

    async def whole(self, owner: str) -> Response:
        """Return the response of a request that does not stream. Raises: ApiError, RequestError."""
        try:
            await self.submit(owner)
            groups = [await run.replies() for run in self.runs]
        finally:
            self.cancel()
        choices = [
            _choice(len(group) * number + index, echo + reply.content, reply.finish_reason, logprobs)
            for number, (echo, group) in enumerate(zip(self.echoes, groups, strict=True))
            for index, (reply, logprobs) in enumerate(zip(group, self._group_logprobs(number, group), strict=True))
        ]
        return json_response(
            {**self.head, "choices": choices, "usage": _usage(groups), "timings": timings(groups[0][0])}
        )

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Yield the frames of all choices, in the order in which they come. Raises: ApiError."""
        n = self.body.n
        offsets = [_Offsets(len(echo)) for echo in self.echoes for _ in range(n)]  # of each choice
        shown_tokens = [0] * len(offsets)
        groups: list[list[Reply]] = [[] for _ in self.runs]
        if self.body.echo:
            for index in range(len(offsets)):
                yield self._frame([_choice(index, self.echoes[index // n], None, None)])
        async for number, event in _merged(self.runs):
            index = number * n + event.choice
            if isinstance(event, Piece):
                tokens, text, reason = event.tokens, event.event.text, None
            else:
                groups[number].append(event.reply)
                tokens, text = (event.reply.logprobs or ())[shown_tokens[index] :], ""
                reason = event.reply.finish_reason
            yield self._frame([_choice(index, text, reason, self._logprobs(tokens, offsets[index]))])
            shown_tokens[index] += len(tokens)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield self._frame([], usage=_usage(groups))
        yield DONE

    def _frame(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return frame({**self.head, "choices": choices, **more})

    def _group_logprobs(self, number: int, group: Sequence[Reply]) -> list[dict[str, Any] | None]:
        """Return the log probabilities of the choices of one prompt, behind those of the prompt if they are wanted."""
        if not self.body.reads_prompt:
            return [self._logprobs(reply.logprobs, _Offsets(len(self.echoes[number]))) for reply in group]
        known = group[0].prompt_logprobs or ()
        return [self._echoed(self.first_tokens[number], [*known, *(reply.logprobs or ())]) for reply in group]

    def _echoed(self, first: bytes, others: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Put a prompt's first token, which nothing leads to, before the others."""
        offsets = _Offsets(0)
        alone: dict[str, list[Any]] = {
            "tokens": [_text(first)],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [offsets.pass_token(first)],
        }
        rest = self._logprobs(others, offsets) or {}
        return {name: [*alone[name], *values] for name, values in rest.items()}

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None, offsets: _Offsets) -> dict[str, Any] | None:
        """Return the log probabilities in the old form: parallel lists."""
        if self.body.logprobs is None:
            return None
        tokens = tokens or ()
        return {
            "tokens": [_text(token.text_bytes) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{_text(text): logprob for _, text, logprob in token.top} for token in tokens],
            "text_offset": [offsets.pass_token(token.text_bytes) for token in tokens],
        }


class _Offsets:
    """Count the characters of a text before each of its tokens; one of several tokens counts when it is whole."""

    def __init__(self, before: int) -> None:
        self._count = before
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_token(self, text: bytes) -> int:
        """Return where the next token begins."""
        offset = self._count
        self._count += len(self._decoder.decode(text))
        return offset


async def _merged(runs: Sequence[Run]) -> AsyncIterator[tuple[int, Piece | Finished]]:
    """Yield the pieces and ends of all runs, with the number of the run, until all have ended. Raises: ApiError."""
    merged: asyncio.Queue[tuple[int, Piece | Finished] | BaseException | None] = asyncio.Queue()

    async def read(number: int, run: Run) -> None:
        try:
            async for event in run.events():
                if isinstance(event, (Piece, Finished)):
                    merged.put_nowait((number, event))
            merged.put_nowait(None)
        except BaseException as error:
            merged.put_nowait(error)

    readers = [asyncio.ensure_future(read(number, run)) for number, run in enumerate(runs)]
    left = len(runs)
    try:
        while left:
            got = await merged.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                left -= 1
            else:
                yield got
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _choice(index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _echo(prompt: Prompt, tokenizer: Tokenizer) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


def _first_tokens(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[bytes]:
    # most=0: a prompt that may be too long is not encoded to its end for its first token
    all_ids = (tokenizer.encode(prompt, most=0) if isinstance(prompt, str) else prompt for prompt in prompts)
    return [tokenizer.token_bytes(ids[0]) if ids else b"" for ids in all_ids]


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

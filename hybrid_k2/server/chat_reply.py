"""A chat's replies as OpenAI writes them: whole, or in frames.

Each frame of a stream has one choice and one kind of increment. The first frame of a choice has the role; an empty
`reasoning_content` says that the thinking has ended; the first frame of a call has its id and name, the others more of
its arguments; the last one of a choice has an empty delta, the finish reason and the usage.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from hybrid_k2.engine.reply import Reply, TokenLogprob
from hybrid_k2.engine.service_types import Finished, Piece, Progress
from hybrid_k2.protocol import Event, call_type
from hybrid_k2.server.openai_usage import chat_logprobs, timings, usage
from hybrid_k2.server.run import Run
from hybrid_k2.server.sse import DONE, frame


@dataclass(frozen=True)
class ReplyForm:
    """What a reply shall look like."""

    id: str
    model: str
    created: int
    choices: int
    logprobs: bool = False
    usage_frame: bool = False  # the last frame of a stream counts all choices
    progress: bool = False  # frames while the prompt is computed
    alias: bool = True  # reasoning under both names that clients look for

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields that begin every object."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def reasoning(self, text: str) -> dict[str, Any]:
        """Return the fields of reasoning."""
        return {"reasoning_content": text, "reasoning": text} if self.alias else {"reasoning_content": text}


def chat_completion(form: ReplyForm, replies: list[Reply]) -> dict[str, Any]:
    """Return the response of a chat that does not stream."""
    return {
        **form.head("chat.completion"),
        "choices": [_choice(form, index, reply) for index, reply in enumerate(replies)],
        "usage": usage(replies),
        "timings": timings(replies[0]),
    }


def _choice(form: ReplyForm, index: int, reply: Reply) -> dict[str, Any]:
    calls = [
        {
            "id": call.id,
            "type": call_type(call.name),
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in reply.tool_calls
    ]
    message: dict[str, Any] = {"role": "assistant", "content": reply.content or (None if calls else "")}
    if reply.reasoning:
        message |= form.reasoning(reply.reasoning)
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(reply.logprobs or ()) if form.logprobs else None,
        "finish_reason": reply.finish_reason,
    }


async def chat_frames(form: ReplyForm, run: Run) -> AsyncGenerator[bytes, None]:
    """Yield the frames of a stream. Raises: ApiError when the service fails."""
    choices = [_ChoiceFrames(form, index) for index in range(form.choices)]
    ended: list[Reply] = []

    def written(choice: dict[str, Any], **more: Any) -> bytes:
        return frame({**form.head("chat.completion.chunk"), "choices": [choice], **more})

    for choice in choices:
        yield written(choice.increment({"role": "assistant", "content": ""}))
    async for event in run.events():
        if isinstance(event, Progress):
            if form.progress:
                progress = {"total": event.total, "processed": event.done, "cache": event.cached}
                yield written(choices[0].increment({}), prompt_progress=progress)
        elif isinstance(event, Piece):
            for increment in choices[event.choice].piece(event.event, event.tokens):
                yield written(increment)
        else:
            ended.append(event.reply)
            yield written(choices[event.choice].end(event), timings=timings(event.reply))
    if form.usage_frame:
        yield frame({**form.head("chat.completion.chunk"), "choices": [], "usage": usage(ended)})
    yield DONE


@dataclass
class _ChoiceFrames:
    """Write the increments of one choice."""

    form: ReplyForm
    index: int
    thinking: bool = False  # reasoning was the last that came
    shown_tokens: int = 0
    waiting_tokens: list[TokenLogprob] = field(default_factory=list)

    def increment(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """Return the choice of one frame, with the tokens that belong to it."""
        choice = {"index": self.index, "delta": delta, "finish_reason": finish_reason}
        if self.form.logprobs:
            choice["logprobs"] = chat_logprobs(self.waiting_tokens) if self.waiting_tokens else None
            self.shown_tokens += len(self.waiting_tokens)
            self.waiting_tokens = []
        return choice

    def piece(self, event: Event, tokens: tuple[TokenLogprob, ...]) -> Iterator[dict[str, Any]]:
        """Yield the increments of one event."""
        if self.form.logprobs:
            self.waiting_tokens += tokens
        if event.kind == "reasoning":
            self.thinking = True
            yield self.increment(self.form.reasoning(event.text))
            return
        if self.thinking:
            self.thinking = False
            yield {"index": self.index, "delta": self.form.reasoning(""), "finish_reason": None}
        if event.kind == "content":
            yield self.increment({"content": event.text})
        elif event.kind == "tool_call_begin":
            assert event.id is not None
            assert event.name is not None
            yield self.increment(
                _call_delta(
                    event.index,
                    {"name": event.name, "arguments": ""},
                    id=event.id,
                    type=call_type(event.name),
                )
            )
        elif event.kind == "tool_call_arguments":
            yield self.increment(_call_delta(event.index, {"arguments": event.text}))

    def end(self, event: Finished) -> dict[str, Any]:
        """Return the last increment."""
        if self.form.logprobs:
            self.waiting_tokens = list((event.reply.logprobs or ())[self.shown_tokens :])
        return self.increment({}, event.reply.finish_reason) | {"usage": usage([event.reply])}


def _call_delta(index: int | None, function: dict[str, str], **more: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, **more, "function": function}]}

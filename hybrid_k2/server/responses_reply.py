"""A reply as the Responses API writes it: events that build up items; the last one has the whole response."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from hybrid_k2.engine.reply import Reply, TokenLogprob
from hybrid_k2.engine.service_types import Finished, Piece
from hybrid_k2.protocol import Event
from hybrid_k2.server.errors import ApiError
from hybrid_k2.server.openai_usage import chat_logprobs, new_id
from hybrid_k2.server.run import Run

_Event = dict[str, Any]


async def response_events(
    head: dict[str, Any], run: Run, with_logprobs: bool, failing: bool = False
) -> AsyncIterator[_Event]:
    """Yield the events of a stream; the last one has the response as it is without a stream.

    `head`: the response's fields but for its output. `failing`: the failure of the service is an event, too.
    Raises: ApiError when the service fails, without `failing`.
    """
    items = _Items(with_logprobs)
    number = 0

    def numbered(kind: str, **fields: Any) -> _Event:
        nonlocal number
        number += 1
        return {"type": f"response.{kind}", "sequence_number": number - 1, **fields}

    begun = {**head, "status": "in_progress", "output": [], "usage": None}
    yield numbered("created", response=begun)
    yield numbered("in_progress", response=begun)
    try:
        async for event in run.events():
            if isinstance(event, Piece):
                for kind, fields in items.piece(event.event, event.tokens):
                    yield numbered(kind, **fields)
            elif isinstance(event, Finished):
                for kind, fields in items.end(complete=event.reply.finish_reason != "length"):
                    yield numbered(kind, **fields)
                whole = {**head, **_outcome(event.reply), "output": items.done, "usage": _usage(event.reply)}
                yield numbered(whole["status"], response=whole)
    except ApiError as error:
        if not failing:
            raise
        failure = {"code": "server_error", "message": error.message}
        yield numbered("failed", response={**begun, "status": "failed", "output": items.done, "error": failure})


@dataclass
class _Items:
    """Turn pieces into the events of output items."""

    with_logprobs: bool
    done: list[dict[str, Any]] = field(default_factory=list)
    _open: dict[str, Any] | None = None
    _texts: list[str] = field(default_factory=list)
    _logprobs: list[dict[str, Any]] = field(default_factory=list)

    def piece(self, event: Event, tokens: tuple[TokenLogprob, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the kinds and fields of the events of one piece."""
        if event.kind == "reasoning":
            if self._kind != "reasoning":
                yield from self._begin({"type": "reasoning", "id": new_id("rs_"), "summary": [], "content": []})
            yield self._delta("reasoning_text", event.text)
        elif event.kind == "content":
            if self._kind != "message":
                yield from self._begin({"type": "message", "id": new_id("msg_"), "role": "assistant", "content": []})
                yield "content_part.added", {**self._part_place, "part": _output_text("", [])}
            kind, fields = self._delta("output_text", event.text)
            more = chat_logprobs(tokens)["content"] if self.with_logprobs else []
            self._logprobs += more
            yield kind, {**fields, "logprobs": more}
        elif event.kind == "tool_call_begin":
            call = {"type": "function_call", "id": new_id("fc_"), "call_id": event.id, "name": event.name}
            yield from self._begin({**call, "arguments": ""})
        elif event.kind == "tool_call_arguments":
            self._texts.append(event.text)
            yield "function_call_arguments.delta", {**self._place, "delta": event.text}
        elif event.kind == "tool_call_end":
            yield from self.end(complete=True)

    def end(self, complete: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what ends the open item, if one is; one that was cut short is marked so."""
        if self._open is None:
            return
        item, text = self._open, "".join(self._texts)
        if item["type"] == "reasoning":
            item["content"] = [{"type": "reasoning_text", "text": text}]
            yield "reasoning_text.done", {**self._part_place, "text": text}
        elif item["type"] == "message":
            part = _output_text(text, self._logprobs)
            item["content"] = [part]
            yield "output_text.done", {**self._part_place, "text": text, "logprobs": self._logprobs}
            yield "content_part.done", {**self._part_place, "part": part}
        else:
            item["arguments"] = text
            yield "function_call_arguments.done", {**self._place, "arguments": text, "name": item["name"]}
        item["status"] = "completed" if complete else "incomplete"
        yield "output_item.done", {"output_index": len(self.done), "item": item}
        self.done.append(item)
        self._open, self._texts, self._logprobs = None, [], []

    @property
    def _kind(self) -> str:
        return "" if self._open is None else str(self._open["type"])

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.done)}

    @property
    def _part_place(self) -> dict[str, Any]:
        return {**self._place, "content_index": 0}

    def _begin(self, item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self.end(complete=True)
        self._open = {**item, "status": "in_progress"}
        yield "output_item.added", {"output_index": len(self.done), "item": dict(self._open)}

    def _delta(self, kind: str, text: str) -> tuple[str, dict[str, Any]]:
        self._texts.append(text)
        return f"{kind}.delta", {**self._part_place, "delta": text}


def _output_text(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _outcome(reply: Reply) -> dict[str, Any]:
    if reply.finish_reason == "length":
        return {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return {"status": "completed", "incomplete_details": None}


def _usage(reply: Reply) -> dict[str, Any]:
    counts = reply.usage
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {"cached_tokens": counts.cached_tokens},
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }

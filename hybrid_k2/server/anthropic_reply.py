"""A reply as Anthropic writes it: a message of blocks, or events that build it up."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from hybrid_k2.engine.reply import Reply
from hybrid_k2.engine.service_types import Finished, Piece
from hybrid_k2.protocol import Event
from hybrid_k2.server.run import Run
from hybrid_k2.server.sse import frame

# Clients keep what proves a thought and send it back; here nothing needs to be proved.
SIGNATURE = "hybrid-k2"
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def message(message_id: str, model: str, reply: Reply) -> dict[str, Any]:
    """Return the response of a request that does not stream."""
    content: list[dict[str, Any]] = []
    if reply.reasoning:
        content.append({"type": "thinking", "thinking": reply.reasoning, "signature": SIGNATURE})
    if reply.content:
        content.append({"type": "text", "text": reply.content})
    for call in reply.tool_calls:
        content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)})
    return {**_head(message_id, model), "content": content, **_stop(reply), "usage": _usage(reply)}


async def message_frames(message_id: str, model: str, run: Run) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream. Raises: ApiError when the service fails."""
    blocks = _Blocks()
    started = False
    async for event in run.events():
        if not started:  # the first one says how much of the prompt was cached
            started = True
            cached = 0 if isinstance(event, (Piece, Finished)) else event.cached
            counts = {
                "input_tokens": run.prompt_tokens - cached,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": cached,
                "output_tokens": 0,
            }
            begun = {**_head(message_id, model), "content": [], "stop_reason": None, "stop_sequence": None}
            yield _frame("message_start", message={**begun, "usage": counts})
            yield _frame("ping")
        if isinstance(event, Piece):
            for part in blocks.piece(event.event):
                yield part
        elif isinstance(event, Finished):
            for part in blocks.end_block():
                yield part
            yield _frame("message_delta", delta=_stop(event.reply), usage=_usage(event.reply))
            yield _frame("message_stop")


@dataclass
class _Blocks:
    """Turn pieces into the events of content blocks: each kind of text, and each call, is a block."""

    index: int = 0
    open: str = ""  # the kind of the block that is open
    _names: dict[str, str] = field(default_factory=lambda: {"reasoning": "thinking", "content": "text"}, repr=False)

    def piece(self, event: Event) -> Iterator[bytes]:
        """Yield the events of one piece."""
        if event.kind in self._names:
            kind = self._names[event.kind]
            if self.open != kind:
                yield from self.end_block()
                empty = {"thinking": "", "signature": ""} if kind == "thinking" else {"text": ""}
                yield self._begin(kind, {"type": kind, **empty})
            yield self._delta({"type": f"{kind}_delta", kind: event.text})
        elif event.kind == "tool_call_begin":
            yield from self.end_block()
            yield self._begin("tool_use", {"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
        elif event.kind == "tool_call_arguments":
            yield self._delta({"type": "input_json_delta", "partial_json": event.text})
        elif event.kind == "tool_call_end":
            yield from self.end_block()

    def end_block(self) -> Iterator[bytes]:
        """Yield what ends the open block, if one is."""
        if not self.open:
            return
        if self.open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        yield _frame("content_block_stop", index=self.index)
        self.open = ""
        self.index += 1

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        self.open = kind
        return _frame("content_block_start", index=self.index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _frame("content_block_delta", index=self.index, delta=delta)


def _frame(kind: str, **fields: Any) -> bytes:
    return frame({"type": kind, **fields}, kind)


def _head(message_id: str, model: str) -> dict[str, Any]:
    return {"id": message_id, "type": "message", "role": "assistant", "model": model}


def _stop(reply: Reply) -> dict[str, Any]:
    if isinstance(reply.matched_stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": reply.matched_stop}
    return {"stop_reason": _STOP_REASONS[reply.finish_reason], "stop_sequence": None}


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "input_tokens": reply.usage.prompt_tokens - reply.usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": reply.usage.cached_tokens,
        "output_tokens": reply.usage.completion_tokens,
    }


def _input(arguments: str) -> Any:
    """Return the arguments of a call as an object; what is none, which a grammar prevents, under one name."""
    try:
        values = json.loads(arguments)
    except ValueError:
        values = None
    return values if isinstance(values, dict) else {"arguments": arguments}

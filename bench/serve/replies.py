"""Ask for a reply and put it together, so that two of them can be compared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from bench.serve.http import post
from bench.serve.process import Server


@dataclass
class Choice:
    """One reply of a stream."""

    reasoning: str = ""
    content: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)  # name, then the parts of the arguments
    finish_reason: str | None = None
    tokens: int = 0

    def take(self, choice: dict[str, Any]) -> None:
        """Take the increment of one frame."""
        delta = choice["delta"]
        self.reasoning += delta.get("reasoning_content") or ""
        self.content += delta.get("content") or ""
        for call in delta.get("tool_calls") or ():
            function = call["function"]
            self.calls.setdefault(call["index"], []).extend(filter(None, (function.get("name"), function["arguments"])))
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        if "usage" in choice:
            self.tokens = choice["usage"]["completion_tokens"]

    def text(self) -> str:
        """Return everything that was said, in one text."""
        calls = ["".join(parts) for _, parts in sorted(self.calls.items())]
        return json.dumps([self.reasoning, self.content, calls, self.finish_reason, self.tokens])


class RefusedError(Exception):
    """The server answered with another status than 200."""


async def stream_reply(server: Server, request: dict[str, Any]) -> list[Choice]:
    """Stream the replies to a request. Raises: RefusedError; ConnectionError: the stream broke."""
    choices = [Choice() for _ in range(request.get("n", 1))]
    async with server.exchange() as exchange:
        await exchange.send(post(json.dumps({**request, "stream": True}).encode()))
        status, headers = await exchange.head()
        if status != 200:
            raise RefusedError(f"{status}: {(await exchange.body(headers)).decode(errors='replace')}")
        async for frame in exchange.frames():
            if "error" in frame:
                raise ConnectionError(f"the stream ended with {frame['error']}")
            for choice in frame["choices"]:
                choices[choice["index"]].take(choice)
    return choices


def text_of(choices: list[Choice]) -> str:
    """Return the texts of all choices."""
    return "\n".join(choice.text() for choice in choices)

"""A chat, in whichever dialect it was asked for, and the request of the service that it becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_k2.engine.grammar import Grammar
from hybrid_k2.engine.service_types import ServiceRequest
from hybrid_k2.protocol import Tokenizer
from hybrid_k2.protocol.tokens import CALL_BEGIN, SECTION_BEGIN
from hybrid_k2.server.options import Limits
from hybrid_k2.server.response_format import read_response_format
from hybrid_k2.server.sampling import SamplingFields, cache_salt
from hybrid_k2.server.thinking import Thinking


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What a chat asks for, its fields checked; `service_request` does what takes time."""

    messages: Sequence[Mapping[str, Any]]
    tools: list[dict[str, Any]]
    tool_choice: str  # auto, none, required, or =NAME
    parallel: bool  # whether several calls may come at once
    thinking: Thinking
    sampling: SamplingFields
    max_tokens: int | None
    logprobs: int | None = None  # how many alternatives of each token to report
    response_format: Any = None
    salt: str = ""

    def service_request(self, tokenizer: Tokenizer, owner: str, limits: Limits) -> ServiceRequest:
        """Compile grammars and build what the service takes. Raises: ApiError, RequestError."""
        callable_tools = [] if self.tool_choice == "none" else self.tools
        return ServiceRequest(
            messages=self.messages,
            tools=self.tools or None,  # also where none may be called: the prompt stays that of the turns before
            thinking=self.thinking.on,
            preserve_thinking=self.thinking.keep,
            params=self.sampling.params(
                max_tokens=self.max_tokens,
                logprobs=self.logprobs,
                grammar=self._grammar(callable_tools, limits),
                forbidden_ids=() if callable_tools else _call_ids(tokenizer),
            ),
            key=owner,
            cache_salt=cache_salt(owner, self.salt),
            n=self.sampling.n,
        )

    def _grammar(self, tools: list[dict[str, Any]], limits: Limits) -> Grammar | None:
        """Return what binds the reply; a forced call leaves no content to bind. Raises: ApiError, RequestError."""
        content = read_response_format(self.response_format, limits)
        if not tools:
            return content
        if self.tool_choice == "auto" and content is not None:
            return content.or_calls(tools, parallel=self.parallel)
        if self.tool_choice in ("auto", "required"):
            return Grammar.tools(tools, self.tool_choice, parallel=self.parallel)
        return Grammar.tools(
            [tool for tool in tools if _name(tool) == self.tool_choice[1:]], "required", parallel=False
        )


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool["function"]["name"])


def _call_ids(tokenizer: Tokenizer) -> Iterable[int]:
    """Return the tokens that begin a call, for a reply that shall have none."""
    return [tokenizer.special[name] for name in (SECTION_BEGIN, CALL_BEGIN) if name in tokenizer.special]

"""A service whose replies are written in the test: token ids go through the real parser, as those of a model do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hybrid_k2.engine.loading import plan_checkpoint
from hybrid_k2.engine.output import Output, PlainText
from hybrid_k2.engine.reply import FinishReason, Reply, Timings, TokenLogprob, Usage
from hybrid_k2.engine.service_types import Failed, Finished, Piece, Progress, ServiceEvent, ServiceRequest, ServiceStats
from hybrid_k2.errors import HybridK2Error
from hybrid_k2.experts.usage import ExpertUse
from hybrid_k2.placement import Plan
from hybrid_k2.protocol import ImageFormat, OutputParser, Tokenizer, canonical_history, encode_chat


@dataclass
class Script:
    """One reply: its token ids in steps; what comes before, between and instead of them."""

    steps: Sequence[Sequence[int]] = ()
    finish_reason: FinishReason = "stop"
    progress: Sequence[tuple[int, int, int]] = ()
    error: HybridK2Error | None = None  # instead of an end
    refusal: HybridK2Error | None = None  # instead of a ticket
    gate: threading.Event | None = None  # waited for before each step


@dataclass
class ScriptedTicket:
    """A request on its way."""

    id: str
    prompt_tokens: int
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedService:
    """Play one script for each choice of a request, on a thread of its own; requests and tickets are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.context_tokens = 4096
        self.images: ImageFormat | None = None  # a model that reads text only
        self.scripts: list[Script] = []
        self.requests: list[ServiceRequest] = []
        self.tickets: list[ScriptedTicket] = []
        self.uses = {1: ExpertUse([3, 0, 1], []), 2: ExpertUse([0, 2, 2], [1])}
        self.closed = False
        self._threads: list[threading.Thread] = []

    @cached_property
    def plan(self) -> Plan:
        return plan_checkpoint("demo")

    def expert_use(self) -> dict[int, ExpertUse]:
        return self.uses

    def submit(self, request: ServiceRequest, on_event: Callable[[ServiceEvent], None]) -> ScriptedTicket:
        self.requests.append(request)
        prompt_tokens = len(self._prompt(request))
        scripts = [self.scripts.pop(0) for _ in range(request.n)]
        if (refusal := scripts[0].refusal) is not None:
            raise refusal
        ticket = ScriptedTicket(f"t{len(self.tickets)}", prompt_tokens)
        self.tickets.append(ticket)
        thread = threading.Thread(target=self._play, args=(request, scripts, ticket, on_event), daemon=True)
        self._threads.append(thread)
        thread.start()
        return ticket

    def stats(self) -> ServiceStats:
        return ServiceStats(
            started_at=0.0,
            running=sum(thread.is_alive() for thread in self._threads),
            kv_pages_used=3,
            kv_pages_total=12,
        )

    def drain(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        for ticket in self.tickets:
            ticket.cancel()

    def _prompt(self, request: ServiceRequest) -> Sequence[int]:
        if request.messages is None:
            assert request.prompt is not None
            prompt = request.prompt
            return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        messages, _ = canonical_history(request.messages)
        thinking, keep = request.thinking, request.preserve_thinking
        ids, _ = encode_chat(self.tokenizer, messages, request.tools, thinking, keep, images=self.images)
        return ids

    def _play(
        self,
        request: ServiceRequest,
        scripts: list[Script],
        ticket: ScriptedTicket,
        on_event: Callable[[ServiceEvent], None],
    ) -> None:
        for done, total, cached in scripts[0].progress:
            on_event(Progress(done, total, cached))
        for choice, script in enumerate(scripts):
            if request.messages is None:
                parser: Any = PlainText(self.tokenizer)
            else:
                _, call_ids = canonical_history(request.messages)
                parser = OutputParser(self.tokenizer, request.tools, request.thinking, call_ids)
            output = Output(parser, request.params.stop)
            ids: list[int] = []
            logprobs: list[TokenLogprob] = []
            shown = 0
            for step in script.steps:
                if script.gate is not None:
                    while not (script.gate.wait(0.01) or ticket.cancelled.is_set()):
                        pass
                    script.gate.clear()
                if ticket.cancelled.is_set() or output.matched_stop is not None:
                    break
                ids += step
                if request.params.logprobs is not None:
                    logprobs += [self._logprob(token) for token in step]
                for event in output.feed(step):
                    on_event(Piece(choice, event, tuple(logprobs[shown:])))
                    shown = len(logprobs)
            if script.error is not None:
                on_event(Failed(script.error))
                return
            last = output.finish()
            for event in last:
                on_event(Piece(choice, event))
            reason = "cancelled" if ticket.cancelled.is_set() else script.finish_reason
            on_event(Finished(choice, self._reply(output, ticket, ids, reason, logprobs)))

    def _logprob(self, token: int) -> TokenLogprob:
        return TokenLogprob(token, self.tokenizer.token_bytes(token), -0.5, ())

    @staticmethod
    def _reply(
        output: Output, ticket: ScriptedTicket, ids: list[int], reason: FinishReason, logprobs: list[TokenLogprob]
    ) -> Reply:
        if reason == "stop" and output.tool_calls:
            reason = "tool_calls"
        return Reply(
            content=output.content,
            reasoning=output.reasoning,
            tool_calls=output.tool_calls,
            finish_reason=reason,
            matched_stop=output.matched_stop,
            seed=1,
            usage=Usage(ticket.prompt_tokens, 2, len(ids), 1),
            timings=Timings(0.5, 0.25, 10.0, 20.0, None),
            token_ids=tuple(ids),
            logprobs=tuple(logprobs) or None,
        )

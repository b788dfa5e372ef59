"""Who answers in a chat: what the chat needs to know of it, and the engine in this process (a server: `cli.remote`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hybrid_k2.cli.chat.conversation import Message
from hybrid_k2.cli.chat.media import MEDIA
from hybrid_k2.cli.chat.options import ChatOptions
from hybrid_k2.cli.loading import load_engine
from hybrid_k2.cli.terminal import Output
from hybrid_k2.placement.sizes import format_bytes

if TYPE_CHECKING:
    from hybrid_k2.engine import Engine, Generation, Reply
    from hybrid_k2.protocol import Event

OnPrefill = Callable[[int, int], None]  # prompt tokens done, prompt tokens
CANCELLED = "cancelled"


class ReplyStream(Protocol):
    """A reply while it is made. The last of its events is of kind `finish`; an error ends them."""

    def __iter__(self) -> Iterator[Event]: ...

    def cancel(self) -> None:
        """End the reply soon, with a `finish`. A signal handler may call this while an event is waited for."""
        ...

    def close(self) -> None:
        """End the reply now, without further events."""
        ...

    @property
    def reply(self) -> Reply:
        """The reply so far; its finish reason is "cancelled" unless it came to its end."""
        ...


class Backend(Protocol):
    """Who answers: an engine or a server."""

    @property
    def model(self) -> str:
        """The name of the model."""
        ...

    @property
    def context_tokens(self) -> int | None:
        """The longest prompt and reply together; None: not known."""
        ...

    @property
    def sees(self) -> Collection[str]:
        """What messages may hold beside text: `image`, `video`."""
        ...

    def start(self, messages: Sequence[Message], options: ChatOptions, on_prefill: OnPrefill) -> ReplyStream:
        """Ask for a reply. Raises: HybridK2Error: it was refused."""
        ...

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what there is to say about model and machine, each with its name."""
        ...

    def close(self) -> None:
        """Free what is held. Closing twice is fine."""
        ...


class LocalBackend:
    """An engine in this process; `model` is as the user named it."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.model = model
        self._engine = engine

    @property
    def context_tokens(self) -> int:
        """The longest prompt and reply together."""
        return self._engine.context_tokens

    @property
    def sees(self) -> Collection[str]:
        """What messages may hold beside text."""
        return () if self._engine.images is None else MEDIA

    def start(self, messages: Sequence[Message], options: ChatOptions, on_prefill: OnPrefill) -> Generation:
        """Ask for a reply; nothing is computed before its first event. Raises: RequestError."""
        return self._engine.generate(
            messages=messages,
            tools=options.tools,
            thinking=options.thinking,
            params=options.params,
            on_prefill=on_prefill,
        )

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the model, where it lies, and how fast the memory is."""
        engine, plan = self._engine, self._engine.plan
        yield "model", f"{self.model} ({plan.config.model_type}, {plan.config.num_hidden_layers} layers)"
        yield "rules", plan.rules.source
        for device in plan.devices:
            yield device, f"{format_bytes(plan.bytes_on(device))} planned"
        yield "experts", f"{engine.experts_name}, {plan.threads} thread{'s' * (plan.threads > 1)}"
        yield "memory", f"{engine.read_gbps:.1f} GB/s read; {format_bytes(plan.bytes_per_token)} per decoded token"

    def close(self) -> None:
        """Free the weights."""
        self._engine.close()


def load_backend(model: str, rules: str | None, trace: Path | None, notes: Output) -> LocalBackend:
    """Load the engine, and say what happens. Raises: HybridK2Error."""
    return LocalBackend(load_engine(model, rules, notes, trace), model)

"""A server as the backend of a chat: find the model, wait until it is loaded, ask for replies."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from hybrid_k2.cli.chat.backend import OnPrefill
from hybrid_k2.cli.chat.conversation import Message
from hybrid_k2.cli.chat.media import MEDIA, require_sight
from hybrid_k2.cli.chat.options import ChatOptions
from hybrid_k2.cli.loading import Speed, show_progress
from hybrid_k2.cli.remote.address import Address
from hybrid_k2.cli.remote.reply import RemoteReply
from hybrid_k2.cli.remote.server import Server
from hybrid_k2.cli.terminal import Output
from hybrid_k2.errors import ServerError

POLL_S = 0.5
_PARAMS = (  # of SamplingParams, under the names that the API has for them, too
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "max_tokens",
)


class FoundModel(NamedTuple):
    """What a server says of a model; the context is None while it is loaded."""

    name: str
    context_tokens: int | None
    sees: Collection[str]  # what messages may hold beside text: `image`, `video`


class RemoteBackend:
    """A model of a server."""

    def __init__(self, server: Server, found: FoundModel) -> None:
        self.model = found.name
        self.context_tokens = found.context_tokens
        self.sees = found.sees
        self._server = server

    def start(self, messages: Sequence[Message], options: ChatOptions, on_prefill: OnPrefill) -> RemoteReply:
        """Ask for a reply. Raises: ServerError: it was refused."""
        body = chat_request(self.model, messages, options)
        return RemoteReply(self._server.stream("/v1/chat/completions", body), options.params.seed, on_prefill)

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the server's address and the model."""
        yield "server", self._server.name
        yield "model", self.model

    def close(self) -> None:
        """Do nothing: there is a connection only while a reply is made."""


def chat_request(model: str, messages: Sequence[Message], options: ChatOptions) -> dict[str, Any]:
    """Return the body of a request; what the user left out is the server's choice."""
    params = options.params
    body: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "stream": True,
        "return_progress": True,
        "thinking": {"type": "enabled" if options.thinking else "disabled"},
    }
    if options.tools:
        body["tools"] = options.tools
    if params.stop:
        body["stop"] = list(params.stop)
    return body | {name: getattr(params, name) for name in _PARAMS if getattr(params, name) is not None}


def connect(
    address: Address, api_key: str | None, model: str | None, media: Collection[str], notes: Output
) -> RemoteBackend:
    """Find the model (None: the server's first), and wait until it is loaded.

    Raises: ServerError: no such server or model, or the key is refused; RequestError: it cannot read these media.
    """
    server = Server(address, api_key)
    find_model(server, model)  # a wrong address, key or name is said before the wait
    wait_until_loaded(server, notes)
    found = find_model(server, model)
    context = "" if found.context_tokens is None else f", {found.context_tokens} tokens of context"
    notes.line(f"server: {server.name}, model {found.name}{context}", "dim")
    for medium in media:
        require_sight(found.sees, medium, found.name, f"--{medium}")
    return RemoteBackend(server, found)


def find_model(server: Server, wanted: str | None) -> FoundModel:
    """Return what the server says of a model (None: of its first). Raises: ServerError."""
    status, content = server.get("/v1/models")
    if status != 200:
        raise server.refusal(status, content)
    models = content.get("data") if isinstance(content, dict) else None
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise server.stranger("no list of models")
    served = {model["id"]: model for model in models if isinstance(model.get("id"), str)}
    name = next(iter(served), None) if wanted is None else wanted
    if name is None or name not in served:
        names = ", ".join(served) or "none"
        raise ServerError(f"{server.name}: expected a model that it serves ({names}), got {name or 'none'}")
    context = served[name].get("context_length")
    sees = [medium for medium in MEDIA if served[name].get(f"supports_{medium}_in") is True]
    return FoundModel(name, context if isinstance(context, int) else None, sees)


def wait_until_loaded(server: Server, notes: Output) -> None:
    """Show how far the loading is. Raises: ServerError: the server ends, or cannot answer."""
    status, read, total = _health(server)
    if status == "ok":
        return
    notes.line(f"{server.name}: the model is loading", "dim")
    with show_progress(notes, Speed()) as report:
        while status == "loading":
            if total:
                report(read, total)
            time.sleep(POLL_S)
            status, read, total = _health(server)


def _health(server: Server) -> tuple[str, int, int]:
    """Return ok or loading, and the bytes read and to read. Raises: ServerError for any other state."""
    status, content = server.get("/health")
    if status == 200:
        return "ok", 0, 0
    state = content.get("status") if isinstance(content, dict) else None
    if state != "loading":
        if state is None:
            raise server.refusal(status, content)
        raise ServerError(f"{server.name}: expected a server that takes requests, got one that is {state}")
    progress = content.get("progress")
    sizes = [progress.get(name) if isinstance(progress, dict) else None for name in ("read_bytes", "total_bytes")]
    read, total = (size if isinstance(size, int) else 0 for size in sizes)
    return "loading", read, total

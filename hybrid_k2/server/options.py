"""How a server behaves, fixed when it starts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hybrid_k2.engine.service_types import MAX_CHOICES
from hybrid_k2.errors import ConfigError, shown
from hybrid_k2.server.hosts import is_host_name

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/]+|null|\*")  # as browsers write it


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a request may hold, and all of them together; beyond it stands an error, before anything is computed."""

    body_bytes: int = 32 * 2**20
    all_bodies_bytes: int = 2**30  # of the requests that have no whole answer yet
    connections: int = 512  # open at once
    head_s: float = 20.0  # until the whole head of a request must be here
    body_s: float = 60.0  # until the whole body must be here
    write_s: float = 60.0  # in which a client must take some of what was written
    headers: int = 100
    header_bytes: int = 64 * 2**10
    images: int = 32  # of one request
    messages: int = 10_000  # the context of K2.6 holds no more
    tools: int = 128  # as the official API
    choices: int = MAX_CHOICES  # n, times the prompts of a text completion
    schema_bytes: int = 256 * 2**10
    schema_depth: int = 64


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Hold what the command line says about the server. Raises: ConfigError."""

    model_names: tuple[str, ...]  # a reply has that of its request, or the first
    api_keys: tuple[str, ...] = ()  # none: every client may come
    hosts: tuple[str, ...] = ()  # names by which clients may address it, beside IP addresses; none: any
    cors_origins: tuple[str, ...] = ()  # origins of pages that may call from a browser; "*" for all
    web: bool = True  # the page at /
    strict_moonshot: bool = False  # refuse what the official API refuses
    keep_alive_s: float = 15.0  # a comment in a silent stream; 0 for none
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ConfigError("served model names: expected at least one name, none of them empty")
        for number, key in enumerate(self.api_keys, 1):
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(f"API key {number}: expected printable ASCII characters without spaces")
        for name in self.hosts:
            if not is_host_name(name):
                raise ConfigError(f"allowed host: expected a name without scheme and port, or *, got {shown(name)}")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"CORS origin: expected scheme and host, as https://example.com, or *, got {shown(origin)}"
                )

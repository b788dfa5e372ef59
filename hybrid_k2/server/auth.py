"""API keys: who may call, and on whose account.

Keys are compared by digest, in constant time, and with all keys each time: neither a key's beginning nor its place in
the list can be found by measuring.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hybrid_k2.errors import shown
from hybrid_k2.server.errors import ApiError, error_response
from hybrid_k2.server.hosts import is_known_host

OPEN_PATHS = frozenset({"/health"})
_BEARER = "bearer "


class ApiKeys:
    """Know a set of keys, and tell them apart by names that give nothing away."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, key: str) -> str | None:
        """Return the name of a key for logs and queues, or None for one that is not known."""
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:12] if any(matches) else None


class Authentication:
    """Let requests with a known key through, with `state["owner"]` set.

    Without keys everybody may call who reaches the server, but not a web page from elsewhere: a browser on this machine
    would let it. `origins`: where pages may come from. `hosts`: by which names the server may be addressed.
    `open_paths`: what needs no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        origins: Collection[str] = (),
        hosts: Collection[str] = (),
        open_paths: Collection[str] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._open_paths = open_paths
        self._keys = keys
        self._origins = origins
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            state = scope.setdefault("state", {})
            try:
                state["owner"] = self._owner(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await error_response(error, scope["path"], state.get("request_id", ""))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _owner(self, path: str, headers: Headers) -> str:
        """Return whose request it is. Raises: ApiError."""
        host = headers.get("host")
        if not is_known_host(host, self._hosts):
            raise ApiError(
                403,
                f"host: expected an IP address or a name of this server, got {shown(host)} "
                "(--allowed-host lets it take others)",
                code="foreign_host",
            )
        if not self._keys:
            origin = headers.get("origin")
            if origin is not None and not self._is_at_home(origin, host or ""):
                raise ApiError(
                    403, "origin: expected a page of this server or one that may call", code="foreign_origin"
                )
            return ""
        owner = self._keys.owner(_presented(headers))
        if owner is None and path not in self._open_paths:
            raise ApiError(401, "API key: expected a known one, got none or another", code="invalid_api_key")
        return owner or ""

    def _is_at_home(self, origin: str, host: str) -> bool:
        return "*" in self._origins or origin in self._origins or origin.partition("://")[2] == host


def _presented(headers: Headers) -> str:
    """Return the key of a request: a bearer token, or the header of Anthropic's clients."""
    authorization = headers.get("authorization", "")
    if authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip()
    return headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

"""API keys: who may call, and on whose account.

Keys are compared by digest, in constant time, and with all keys each time: neither a key's beginning nor its place in
the list can be found by measuring.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hybrid_k2.server.errors import ApiError, error_response

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
    """Let requests with a known key through, with `state["owner"]` set; without keys, all."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["owner"] = ""
            if self._keys and scope["path"] not in OPEN_PATHS:
                owner = self._keys.owner(_presented(Headers(scope=scope)))
                if owner is None:
                    error = ApiError(401, "API key: expected a known one, got none or another", code="invalid_api_key")
                    response = error_response(error, scope["path"], scope["state"].get("request_id", ""))
                    await response(scope, receive, send)
                    return
                scope["state"]["owner"] = owner
        await self._app(scope, receive, send)


def _presented(headers: Headers) -> str:
    """Return the key of a request: a bearer token, or the header of Anthropic's clients."""
    authorization = headers.get("authorization", "")
    if authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip()
    return headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

"""Errors as HTTP: one class with a status, and the form in which each dialect writes it.

    400 the request is wrong         401 no key, or a wrong one       403 a web page from elsewhere, a foreign name
    404 no such route, model, file   405 wrong method                 408 the body came too slowly
    413, 431 body, headers too large 415 the body is packed           429 too many requests of a key
    499 the client has gone          500 the engine failed, or a bug  503 loading, draining, or full

What the engine says about itself (paths, devices) stays in the log; a client reads what concerns its request.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response

from hybrid_k2.engine.service_types import QueueFullError, ServiceClosingError
from hybrid_k2.errors import ContextLengthError, HybridK2Error, RequestError

CLIENT_GONE = 499  # never sent: the log's word for a client that left
ANTHROPIC_PATHS = ("/v1/messages", "/anthropic/")
_RETRY_AFTER_S = 5.0  # of a server that loads, ends or is full

_TYPES = {  # of both dialects, where they agree
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "request_too_large",
    503: "overloaded_error",
}
_MAX_PARAM = 200
_PLACE = re.compile(r"[\w.$\[\]-]{1,100}", re.ASCII)
_PARAMETER = re.compile(r"([A-Za-z_]\w*(?:[.\[][\w.\[\]'\"-]*)?): ")


class ApiError(Exception):
    """One request cannot be answered; becomes a JSON error with this status.

    `param` names the parameter at fault; `code` is a word that programs can compare; `allow`: the methods of a route.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.allow = allow

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with the status."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        if self.allow is not None:
            return {"allow": self.allow}
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Name parameters in errors as the client's dialect does: `names` maps patterns of ours to its own."""
    try:
        yield
    except ApiError as error:
        for pattern, name in names.items():
            renamed, count = re.subn(f"^{pattern}", name, error.param or "")
            if count:
                error.message = error.message.replace(error.param or "", renamed, 1)
                error.param = renamed
                break
        raise


def bad_request(param: str, problem: str, code: str | None = None) -> ApiError:
    """Return the error of one parameter; `problem` says what was expected and what came."""
    # A client may have made up the name.
    name = param if len(param) <= _MAX_PARAM else f"{param[: _MAX_PARAM - 3]}..."
    return ApiError(400, f"{name}: {problem}", param=name, code=code)


def logged(error: ApiError) -> dict[str, str]:
    """Return what the log says of an error: of one in a request its place, not the client's words in its message."""
    if error.status >= 500:
        return {"error": error.message}
    place = error.param if error.param and _PLACE.fullmatch(error.param) else ""
    return {"code": error.code or "", "param": place}


def loading() -> ApiError:
    """Return the error of a server whose model is not there yet."""
    return ApiError(503, "the model is loading", code="loading", retry_after_s=_RETRY_AFTER_S)


def shutting_down() -> ApiError:
    """Return the error of a server that is about to end."""
    return ApiError(503, "the server is shutting down", code="draining", retry_after_s=_RETRY_AFTER_S)


def overloaded(message: str, code: str) -> ApiError:
    """Return the error of a server that has no room for the request now."""
    return ApiError(503, message, code=code, retry_after_s=_RETRY_AFTER_S)


def api_error(error: HybridK2Error) -> ApiError:
    """Turn an error of the engine into one that a client may read."""
    if isinstance(error, ServiceClosingError):
        return shutting_down()
    if isinstance(error, QueueFullError):
        status, code = (429, "too_many_requests") if error.reason == "key" else (503, "queue_full")
        return ApiError(status, error.message, code=code, retry_after_s=error.retry_after_s)
    if isinstance(error, RequestError):
        named = _PARAMETER.match(error.message)
        text = f"{error.message} ({error.hint})" if error.hint else error.message
        too_long = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        return ApiError(400, text, param=named[1] if named else None, code=too_long)
    return ApiError(500, "the engine failed at this request; the server's log says why", code="engine_failed")


def is_anthropic(path: str) -> bool:
    """Say whether a path speaks the dialect of Anthropic."""
    return path.startswith(ANTHROPIC_PATHS)


def error_object(error: ApiError, anthropic: bool = False, request_id: str = "") -> dict[str, Any]:
    """Return the error as the dialect writes it, in a response or inside a stream."""
    kind = _TYPES.get(error.status, "api_error" if anthropic else "server_error")
    if anthropic:
        return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError, path: str, request_id: str = "") -> Response:
    """Return the whole response of an error."""
    return json_response(error_object(error, is_anthropic(path), request_id), error.status, error.headers)


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a value as JSON."""
    return Response(json_bytes(content), status, headers, media_type="application/json")


def json_bytes(content: object) -> bytes:
    """Write JSON as UTF-8; a lone surrogate, which UTF-8 cannot hold and a request may have sent, becomes `?`."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")

"""A name for each request, and one line in the log when it has ended: how it went, never what it said."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from datetime import datetime, timezone
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid_k2.server.errors import CLIENT_GONE, ApiError, error_response, is_anthropic, shutting_down
from hybrid_k2.server.metrics import Metrics
from hybrid_k2.server.run import ClientGoneError

log = logging.getLogger("hybrid_k2.server")

HEADER = "x-request-id"
_ANTHROPIC_HEADER = b"request-id"  # where clients of this dialect look for it
_ACCEPTED_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# Asked for every few seconds.
_QUIET_PATHS = frozenset({"/health", "/metrics", "/v1/hybrid-k2/status", "/v1/hybrid-k2/experts"})


class RequestLog:
    """Give each request an id, answer what went wrong unforeseen with 500, log and count the response.

    A client may name its request with the header `x-request-id`. Routes put what they know into `state["log"]`. HEAD is
    answered as GET is; the server beneath leaves out the body.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        names = [HEADER.encode(), *([_ANTHROPIC_HEADER] if is_anthropic(scope["path"]) else [])]
        facts: dict[str, Any] = {}
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "log": facts}
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = [(name, request_id.encode()) for name in names]
                message = {**message, "headers": [*message["headers"], *named]}
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except ClientGoneError:
            facts["client_gone"] = True
        except asyncio.CancelledError:  # the server has waited long enough
            facts["error"] = "it had not ended when the server did"
            if not status:
                await error_response(shutting_down(), scope["path"], request_id)(scope, receive, send_named)
        except Exception:
            log.exception("request %s failed: this is a bug of hybrid-k2", request_id)
            if not status:
                error = ApiError(500, f"the server failed at this request; its log names it {request_id}")
                await error_response(error, scope["path"], request_id)(scope, receive, send_named)
        finally:
            if facts.get("client_gone"):
                status = CLIENT_GONE
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.response(route, status)
            level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
            line = {
                "request_id": request_id,
                "method": method,
                "route": route,
                "status": status,
                "seconds": round(time.perf_counter() - started, 4),
                "owner": scope["state"].get("owner", ""),
                **facts,
            }
            log.log(level, "request", extra={"facts": {name: fact for name, fact in line.items() if fact != ""}})


class JsonLines(logging.Formatter):
    """Write each record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its newline."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """Write each record as a line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its newline."""
        time_of_day = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        facts = " ".join(f"{name}={_one_line(fact)}" for name, fact in getattr(record, "facts", {}).items())
        line = f"{time_of_day} {record.levelname.lower()}: {record.getMessage()}{' ' if facts else ''}{facts}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _one_line(fact: object) -> str:
    """Write a fact so that nothing of a request can look like a line of its own, or steer a terminal."""
    text = str(fact)
    return text if text.isprintable() else repr(text)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == HEADER.encode() and _ACCEPTED_ID.fullmatch(value):
            return str(value.decode())
    return f"req_{uuid.uuid4().hex[:24]}"

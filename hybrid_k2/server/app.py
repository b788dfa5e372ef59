"""The ASGI application: routes, and around them what every request passes."""

from __future__ import annotations

import time

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from hybrid_k2 import __version__
from hybrid_k2.errors import HybridK2Error, shown
from hybrid_k2.server.anthropic_messages import message_routes
from hybrid_k2.server.auth import OPEN_PATHS, ApiKeys, Authentication
from hybrid_k2.server.backend import Backend
from hybrid_k2.server.context import Context
from hybrid_k2.server.errors import ApiError, api_error, error_response, logged
from hybrid_k2.server.file_store import FileStore
from hybrid_k2.server.files import file_routes
from hybrid_k2.server.images import ImageReader
from hybrid_k2.server.limits import RequestLimits
from hybrid_k2.server.metrics import Metrics
from hybrid_k2.server.models import model_routes
from hybrid_k2.server.openai_chat import chat_routes
from hybrid_k2.server.openai_completions import completion_routes
from hybrid_k2.server.openai_responses import response_routes
from hybrid_k2.server.options import ServerOptions
from hybrid_k2.server.request_log import HEADER, RequestLog
from hybrid_k2.server.status import status_routes
from hybrid_k2.server.web_page import read_web_files, web_routes

_METHODS = ("GET", "POST", "DELETE")  # of all routes, beside HEAD, which is answered as GET is


def create_app(backend: Backend, options: ServerOptions) -> FastAPI:
    """Return the application over a backend, which may still be loading."""
    metrics, files = Metrics(backend), FileStore()
    context = Context(backend, options, metrics, files, ImageReader(files, metrics), int(time.time()))
    # The pages of the documentation would load scripts from elsewhere; the description itself is served.
    # A redirect to the same path without its last slash would go to http, also where a proxy has TLS before it.
    app = FastAPI(title="hybrid-k2", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for routes in (
        model_routes,
        chat_routes,
        completion_routes,
        response_routes,
        message_routes,
        file_routes,
        status_routes,
    ):
        app.include_router(routes(context))
    web_files = read_web_files() if options.web else {}
    if web_files:
        app.include_router(web_routes(web_files))
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HybridK2Error, _answer_engine_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    # The last one added is the first that a request meets.
    app.add_middleware(RequestLimits, limits=options.limits)
    app.add_middleware(
        Authentication,
        keys=ApiKeys(options.api_keys),
        origins=options.cors_origins,
        hosts=options.hosts,
        open_paths=OPEN_PATHS | web_files.keys(),
    )
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=_METHODS,
            allow_headers=["*"],
            expose_headers=[HEADER],
        )
    app.add_middleware(RequestLog, metrics=metrics)
    return app


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.log.update({**logged(error), **request.state.log})  # the engine's own words say more
    return error_response(error, request.url.path, request.state.request_id)


async def _answer_engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HybridK2Error)
    return await _answer_api_error(request, api_error(error))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return await _answer_api_error(request, ApiError(404, "route: expected one of this server's, got another"))
    if error.status_code == 405:
        allowed = _allowed_methods(request)
        return await _answer_api_error(
            request, ApiError(405, f"method: expected {allowed}, got {shown(request.method)}", allow=allowed)
        )
    return await _answer_api_error(request, ApiError(error.status_code, error.detail))


def _allowed_methods(request: Request) -> str:
    """Return what the path can be asked for with: several routes may share it, each with methods of its own."""
    allowed = [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]
    return ", ".join(allowed).replace("GET", "GET, HEAD")

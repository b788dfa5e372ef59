"""An application over a scripted service, and a client that calls it without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar, cast

import httpx
import pytest

from hybrid_k2.demo import demo_path
from hybrid_k2.protocol import ImageFormat, Tokenizer
from hybrid_k2.server.app import create_app
from hybrid_k2.server.backend import Backend, Served
from hybrid_k2.server.options import ServerOptions
from tests.server.browser import Go, Visit, running_browser, site
from tests.server.scripted import Script, ScriptedService

if TYPE_CHECKING:
    from playwright.sync_api import Browser

Result = TypeVar("Result")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_path())


@pytest.fixture
def service(tokenizer: Tokenizer) -> ScriptedService:
    return ScriptedService(tokenizer)


@pytest.fixture
def seeing(service: ScriptedService, tokenizer: Tokenizer) -> ScriptedService:
    """Let the service's model see images, and have replies to many requests."""
    service.images = ImageFormat()
    tokens = tokenizer.encode("</think>A cat.<|im_end|>", allow_special=True)
    service.scripts = [Script([[token] for token in tokens]) for _ in range(20)]
    return service


class Client:
    """Call an application; each call has an event loop of its own."""

    def __init__(self, app: Any, backend: Backend) -> None:
        self.app = app
        self.backend = backend

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **more)

        return run(call())

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.request("GET", path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.request("POST", path, **({"json": body} if body is not None else {}), **more)

    def frames(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Stream, and return the frames without the end mark, which must be there."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *frames, done, rest = response.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(frame.removeprefix("data: ")) for frame in frames if not frame.startswith(":")]


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 60))


@pytest.fixture
def make_client(service: ScriptedService) -> Callable[..., Client]:
    """Make a client; options of the server may be given."""

    def make(*, ready: bool = True, **options: Any) -> Client:
        backend = Backend()
        if ready:
            backend.serve(Served(service, cast(Any, service)))
        return Client(create_app(backend, ServerOptions(**{"model_names": ("k2",), **options})), backend)

    return make


@pytest.fixture
def client(make_client: Callable[..., Client]) -> Client:
    return make_client()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def go(browser: Browser, service: ScriptedService) -> Iterator[Go]:
    """Visit a server with these options."""
    with ExitStack() as stack:

        def visit(context: dict[str, Any] | None = None, **options: Any) -> Visit:
            address, backend = stack.enter_context(site(service, **options))
            visit = Visit(browser, address, backend, **context or {})
            stack.callback(visit.close)
            return visit

        yield visit

"""A headless Chromium, and servers of this process for it to visit."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest
import uvicorn

from hybrid_k2.server.app import create_app
from hybrid_k2.server.backend import Backend, Served
from hybrid_k2.server.listen import listen_tcp
from hybrid_k2.server.options import ServerOptions
from tests.server.scripted import ScriptedService

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from hybrid_k2.engine import Engine
    from hybrid_k2.engine.service import Service

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 60_000  # a busy machine takes its time
VIEW = {"width": 1100, "height": 720}
# Texts and what lies behind them: no pair may have less contrast than AA wants.
CONTRAST = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = parse(colour).map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if ((parse(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("");
    if (!text || !element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    const [one, other] = [getComputedStyle(element).color, behind(element)].map(light).sort();
    if ((other + 0.05) / (one + 0.05) < 4.5) poor.push([text, (other + 0.05) / (one + 0.05)]);
  }
  return poor;
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, a, canvas, dialog, nav, meter, #main img")]
  .filter((each) => !(each.textContent.trim() || each.getAttribute("aria-label") || each.labels?.length
    || each.getAttribute("aria-labelledby") || each.getAttribute("alt")))
  .map((each) => each.outerHTML)"""


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Start the browser, the system's or playwright's own; skip where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program)
        except sync_api.Error as error:
            if program is not None:
                raise
            pytest.skip(
                f"needs chromium: apt-get install chromium, or playwright install chromium: {error.message[:80]}"
            )
        yield browser
        browser.close()


@contextmanager
def site(
    service: ScriptedService | Service, model: Engine | None = None, *, ready: bool = True, **options: Any
) -> Iterator[tuple[str, Backend]]:
    """Serve the application over a service, a scripted one or that of a model, and give its address."""
    backend = Backend()
    if ready:
        backend.serve(Served(model or cast(Any, service), cast(Any, service)))
    listener = listen_tcp("127.0.0.1", 0, tls=False)
    app = create_app(backend, ServerOptions(**{"model_names": ("k2",), **options}))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, args=([listener.socket],))
    thread.start()
    try:
        yield listener.address, backend
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        listener.close()


class Visit:
    """One page of a browser that shares nothing with others, and what went wrong in it."""

    def __init__(self, browser: Browser, address: str, backend: Backend | None = None, **context: Any) -> None:
        self.address = address
        self.backend = backend
        self.faults: list[str] = []
        self._context = browser.new_context(**{"viewport": VIEW, **context})
        self._context.set_default_timeout(WAIT_MS)
        self.page: Page = self._context.new_page()
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._look_at)
        self.page.on("request", self._follow)
        self.page.goto(address)

    def say(self, text: str) -> None:
        """Type a message and send it."""
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def until(self, expression: str, value: Any = None) -> None:
        """Wait until JavaScript finds this true; it is asked from here, as the page's policy forbids `eval` in it."""
        eventually(lambda: self.page.evaluate(expression, value))

    def close(self) -> None:
        """Leave, and complain of what went wrong."""
        self._context.close()
        assert not self.faults

    def _look_at(self, message: Any) -> None:
        refused = message.text.startswith("Failed to load resource")  # by the server, as tests want it
        if message.type in ("error", "warning") and not refused:
            self.faults.append(message.text)

    def _follow(self, request: Any) -> None:
        if not request.url.startswith(self.address):
            self.faults.append(f"a request to {request.url}")


Go = Callable[..., Visit]


def eventually(condition: Any) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

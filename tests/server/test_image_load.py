"""What images of requests cost others: memory, waiting, and lines of the log."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from hybrid_k2.protocol import Image
from hybrid_k2.server import media as server_media
from hybrid_k2.server.options import Limits
from hybrid_k2.server.request_log import JsonLines
from tests.pictures import coded, png, uri
from tests.server.conftest import Client, run
from tests.server.image_requests import (
    CHAT,
    CHAT_URL,
    ESTIMATE,
    PNG,
    chat,
    image_url,
    post_and_leave,
    text,
)
from tests.server.scripted import Script, ScriptedService

pytest.importorskip("PIL.Image", reason="Pillow decodes the images: pip install pillow")
pytestmark = pytest.mark.usefixtures("seeing")


def at_once(client: Client, work: Callable[[httpx.AsyncClient], Any]) -> None:
    """Run requests side by side in one event loop."""

    async def call() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://server") as wire:
            await work(wire)

    run(call())


def test_pixels_count_among_the_bodies(make_client: Callable[..., Client], service: ScriptedService) -> None:
    """An image of a few hundred bytes and 2.25 MiB of pixels finds no room beside a request that waits."""
    flat = uri(png(np.zeros((28 * 32, 28 * 32, 3), np.uint8)))
    client = make_client(limits=Limits(all_bodies_bytes=2**20))
    gate = threading.Event()
    service.scripts = [Script(service.scripts[0].steps, gate=gate), *service.scripts]

    async def ask(wire: httpx.AsyncClient, body: Any) -> httpx.Response:
        return await wire.post(CHAT, json=body)

    async def work(wire: httpx.AsyncClient) -> None:
        first = asyncio.ensure_future(ask(wire, chat(text("wait"))))
        while not service.tickets:
            await asyncio.sleep(0.01)
        refused = await ask(wire, chat(image_url(flat)))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "bodies_full")
        assert (await ask(wire, chat(image_url()))).status_code == 200, "a small one does"
        while not first.done():
            gate.set()
            await asyncio.sleep(0.01)
        assert (await ask(wire, chat(image_url(flat)))).status_code == 200, "alone it may be as large as it is"

    at_once(client, work)


def test_an_image_that_takes_long_holds_up_nobody(
    client: Client, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While many images wait for one, prompts of text are encoded and answered."""
    begun, go_on = threading.Event(), threading.Event()
    read_image = server_media.read_image

    def slow(*given: Any) -> Image:
        begun.set()
        assert go_on.wait(50)
        return read_image(*given)

    monkeypatch.setattr(server_media, "read_image", slow)
    monkeypatch.setattr(server_media, "RECENT_BYTES", 0)  # all are the same one

    async def work(wire: httpx.AsyncClient) -> None:
        asked = [asyncio.ensure_future(wire.post(CHAT, json=chat(image_url()))) for _ in range(40)]
        try:
            while not begun.is_set():
                await asyncio.sleep(0.01)
            assert (await wire.get("/health")).status_code == 200
            large = chat(text("x" * 70_000))  # beyond what is read at once
            assert (await wire.post(ESTIMATE, json=large)).status_code == 200
            assert not any(one.done() for one in asked)
        finally:
            go_on.set()
        assert {(await one).status_code for one in asked} == {200}

    service.scripts *= 2
    service.context_tokens = 100_000
    at_once(client, work)


def test_a_client_that_goes_has_no_more_images_read(
    client: Client, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, read = threading.Event(), threading.Event(), []
    read_image = server_media.read_image

    def slow(*given: Any) -> Image:
        read.append(given[-1])
        begun.set()
        assert go_on.wait(50)
        return read_image(*given)

    monkeypatch.setattr(server_media, "read_image", slow)
    monkeypatch.setattr(server_media, "RECENT_BYTES", 0)  # all are the same one

    async def call() -> None:
        await post_and_leave(client, chat(*[image_url()] * 5), begun)
        go_on.set()

    run(call())
    assert len(read) == 1
    assert not service.requests


def test_the_log_and_the_metrics_count_images_and_show_none(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client.post(CHAT, chat(image_url(), image_url()))
        for url in (f"http://{coded(PNG)}", uri(b"x" + PNG), f"ms://{coded(PNG)}"):
            client.post(CHAT, chat(image_url(url)))
    records = [record for record in caplog.records if record.name == "hybrid_k2.server"]
    lines = [json.loads(JsonLines().format(record)) for record in records]
    assert [line.get("images") for line in lines] == [2, None, None, None]
    assert [line.get("param") for line in lines] == [None, CHAT_URL, CHAT_URL, CHAT_URL]
    assert coded(PNG)[:40] not in json.dumps(lines) + caplog.text
    assert "hybrid_k2_images_total 2.0" in client.get("/metrics").text

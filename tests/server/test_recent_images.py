"""Images of earlier turns are not decoded again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hybrid_k2.server import media as server_media
from tests.pictures import noise_png, uri
from tests.server.conftest import Client
from tests.server.scripted import ScriptedService

pytest.importorskip("PIL.Image", reason="Pillow decodes the images: pip install pillow")
pytestmark = pytest.mark.usefixtures("seeing")

ONE, TWO, THREE = (noise_png(28, 28, seed) for seed in (1, 2, 3))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that are decoded."""
    files: list[bytes] = []
    read_image = server_media.read_image

    def watched(data: bytes, *more: Any) -> Any:
        files.append(data)
        return read_image(data, *more)

    monkeypatch.setattr(server_media, "read_image", watched)
    return files


def ask(client: Client, *images: bytes, key: str = "one") -> None:
    parts = [{"type": "image_url", "image_url": {"url": uri(image)}} for image in images]
    body = {"model": "k2", "messages": [{"role": "user", "content": parts}]}
    response = client.post("/v1/chat/completions", body, headers={"authorization": f"Bearer {key}"})
    assert response.status_code == 200, response.text


def test_an_image_is_decoded_once_for_each_owner(
    make_client: Callable[..., Client], service: ScriptedService, decoded: list[bytes]
) -> None:
    client = make_client(api_keys=("one", "other"))
    ask(client, ONE)
    ask(client, ONE, TWO, ONE)
    ask(client, TWO, key="other")
    assert decoded == [ONE, TWO, TWO]
    first, second, _ = (request.messages or [] for request in service.requests)
    assert second[0]["content"][0]["image"].digest == first[0]["content"][0]["image"].digest
    assert second[0]["content"][1]["image"].digest != first[0]["content"][0]["image"].digest


def test_what_was_used_last_is_kept(
    make_client: Callable[..., Client], decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_media, "RECENT_BYTES", 2 * 3 * 28 * 28)
    client = make_client(api_keys=("one",))
    for image in (ONE, TWO, ONE, THREE, ONE, TWO):  # TWO makes room for THREE
        ask(client, image)
    assert decoded == [ONE, TWO, THREE, TWO]


def test_one_that_is_larger_than_all_is_not_kept(
    make_client: Callable[..., Client], decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_media, "RECENT_BYTES", 3 * 28 * 28 - 1)
    client = make_client(api_keys=("one",))
    ask(client, ONE)
    ask(client, ONE)
    assert decoded == [ONE, ONE]

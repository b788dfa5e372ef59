"""Images that are refused: the place and the reason, in every dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hybrid_k2.server import images as server_images
from hybrid_k2.server.options import Limits
from tests.pictures import coded, uri
from tests.server.conftest import Client
from tests.server.image_requests import (
    BOMB,
    CHAT,
    CHAT_URL,
    COUNT,
    ESTIMATE,
    MESSAGES,
    PNG,
    REMOTE,
    RESPONSE_URL,
    RESPONSES,
    SOURCE,
    block,
    chat,
    image_url,
    input_image,
    message,
    response,
    text,
)
from tests.server.scripted import ScriptedService

pytest.importorskip("PIL.Image", reason="Pillow decodes the images: pip install pillow")
pytestmark = pytest.mark.usefixtures("seeing")


WRONG_URLS = [REMOTE, "http://127.0.0.1/x", "file:///etc/passwd", "/etc/passwd", "cat.png", "", 5, None, {}, ["data:"]]
WRONG_DATA = [
    "data:",
    "data:image/png;base64,",
    "data:image/png;base64,!!!",
    "data:image/png,plain",
    "data:text/html;base64,PGI+",
    "data:image/svg+xml;base64,PHN2Zy8+",
    uri(b"no image"),
    uri(PNG[:60]),
    uri(BOMB),
]


@pytest.mark.parametrize("url", [*WRONG_URLS, *WRONG_DATA], ids=lambda url: repr(url)[:30])
def test_what_is_no_image_is_named(client: Client, service: ScriptedService, url: Any) -> None:
    cases = [(CHAT, chat({"type": "image_url", "image_url": {"url": url}}), CHAT_URL)]
    if url is not None:
        cases.append((RESPONSES, response(input_image(image_url=url)), RESPONSE_URL))
    for path, body, place in cases:
        refused = client.post(path, body)
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", place)
        assert error["message"].startswith(f"{place}: ")
        assert len(error["message"]) < 400
        assert ("opens no connection" in error["message"]) == (url in WRONG_URLS)
    assert not service.requests
    assert client.post(CHAT, chat(image_url())).status_code == 200, "the server lives on"


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"type": "image_url"}, "messages[0].content[0].image_url"),
        (image_url(uri(PNG), detail="best"), "messages[0].content[0].image_url.detail"),
        (image_url(uri(PNG), size=5), "messages[0].content[0].image_url.size"),
        ({"type": "image_url", "image_url": uri(PNG), "text": "x"}, "messages[0].content[0].text"),
        ({"type": "text", "text": "x", "image_url": uri(PNG)}, "messages[0].content[0].image_url"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "messages[0].content[0].type"),
        ({"type": "video", "video": "x"}, "messages[0].content[0].type"),
    ],
)  # fmt: skip
def test_wrong_parts_of_a_chat(client: Client, part: dict[str, Any], place: str) -> None:
    for path in (CHAT, ESTIMATE):
        error = client.post(path, chat(part)).json()["error"]
        assert error["param"] == place
        assert ("no video" in error["message"]) == ("video" in part["type"])


@pytest.mark.parametrize(
    ("part", "place"),
    [
        (input_image(detail="auto"), "input[0].content[0]"),
        (input_image(image_url=uri(PNG), file_id="file-1"), "input[0].content[0]"),
        (input_image(file_id="file-1"), "input[0].content[0].file_id"),
        (input_image(file_id=5), "input[0].content[0].file_id"),
        (input_image(image_url=uri(PNG), detail="best"), "input[0].content[0].detail"),
        (input_image(image_url=uri(PNG), text="x"), "input[0].content[0].text"),
        ({"type": "input_video", "video_url": "x"}, "input[0].content[0].type"),
        ({"type": "input_file", "file_id": "x"}, "input[0].content[0].type"),
    ],
)
def test_wrong_parts_of_a_response(client: Client, part: dict[str, Any], place: str) -> None:
    assert client.post(RESPONSES, response(part)).json()["error"]["param"] == place


def test_the_assistant_of_a_response_shows_no_image(client: Client) -> None:
    body = {"model": "k2", "input": [{"role": "assistant", "content": [input_image()]}]}
    assert client.post(RESPONSES, body).json()["error"]["param"] == "input[0].content[0].type"


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"type": "image"}, SOURCE),
        (block(type="url", url=REMOTE), f"{SOURCE}.type"),
        (block(type="text", data="x"), f"{SOURCE}.type"),
        (block(type="file", file_id="file-1"), f"{SOURCE}.file_id"),
        (block(type="file", file_id=5), f"{SOURCE}.file_id"),
        (block(type="base64", media_type="image/png"), f"{SOURCE}.data"),
        (block(type="base64", media_type="image/bmp", data=coded(PNG)), f"{SOURCE}.media_type"),
        (block(type="base64", data=coded(PNG)), f"{SOURCE}.media_type"),
        (block(type="base64", media_type="image/png", data=coded(PNG), url="x"), f"{SOURCE}.url"),
        (block(type="base64", media_type="image/png", data="!"), f"{SOURCE}.data"),
        (block(type="base64", media_type="image/png", data=""), f"{SOURCE}.data"),
        (block(type="base64", media_type="image/png", data=coded(BOMB)), f"{SOURCE}.data"),
    ],
)
def test_wrong_blocks_of_a_message(client: Client, part: dict[str, Any], place: str) -> None:
    for path, nested in ((MESSAGES, False), (COUNT, False), (MESSAGES, True)):
        blocks = [{"type": "tool_result", "tool_use_id": "c", "content": [part]}] if nested else [part]
        body = message(*blocks, system="With a system message before it.")
        if path == COUNT:
            del body["max_tokens"]
        refused = client.post(path, body)
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["type"] == "invalid_request_error"
        here = place.replace("content[0]", "content[0].content[0]") if nested else place
        assert error["message"].startswith(f"{here}: "), error
        assert len(error["message"]) < 400


def test_a_model_that_reads_text_only_says_so(client: Client, service: ScriptedService) -> None:
    service.images = None
    assert client.get("/v1/models/k2").json()["supports_image_in"] is False
    for path, body, place in (
        (CHAT, chat(text("x"), image_url()), "messages[0].content[1].image_url.url"),
        (ESTIMATE, chat(text("x"), image_url()), "messages[0].content[1].image_url.url"),
        (RESPONSES, response(input_image()), RESPONSE_URL),
        (MESSAGES, message(block(), system="x"), f"{SOURCE}.data"),
    ):
        refused = client.post(path, body)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"] == f"{place}: expected text, got an image: this model reads text only"


def test_too_many_images(make_client: Callable[..., Client], service: ScriptedService) -> None:
    client = make_client(limits=Limits(images=2))
    assert client.post(CHAT, chat(image_url(), text("x"), image_url())).status_code == 200
    for path, body, place in (
        (CHAT, chat(*[image_url()] * 3), "messages[0].content[2].image_url.url"),
        (RESPONSES, response(*[input_image()] * 3), "input[0].content[2].image_url"),
        (MESSAGES, message(*[block()] * 3), "messages[0].content[2].source.data"),
        (COUNT, {"model": "k2", "messages": message(*[block()] * 3)["messages"]}, "messages[0].content[2].source.data"),
    ):
        message_text = client.post(path, body).json()["error"]["message"]
        assert message_text == f"{place}: expected at most 2 images in a request, got 3"


def test_images_beyond_the_context_are_not_all_read(
    client: Client, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    read_image = server_images.read_image
    monkeypatch.setattr(server_images, "read_image", lambda *given: read.append(given[-1]) or read_image(*given))
    monkeypatch.setattr(server_images, "RECENT_BYTES", 0)  # all are the same one
    service.context_tokens = 10
    for path, body, param, most in (
        (CHAT, chat(*[image_url()] * 20), "messages", 2),
        (RESPONSES, response(*[input_image()] * 20), "input", 2),
        (ESTIMATE, chat(*[image_url()] * 20), "messages", 10),
    ):
        read.clear()
        refused = client.post(path, body)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert len(read) == most + 1

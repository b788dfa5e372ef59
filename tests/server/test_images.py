"""Images in requests: each dialect shows the model the picture that was sent, or says what is wrong with it."""

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
from numpy.typing import NDArray

from hybrid_k2.protocol import Image, ImageFormat, Tokenizer
from hybrid_k2.server import images as server_images
from hybrid_k2.server.options import Limits
from hybrid_k2.server.request_log import JsonLines
from tests.pictures import coded, noise_png, picture, png, uri
from tests.server.browser import site
from tests.server.conftest import Client, run
from tests.server.scripted import Script, ScriptedService
from tests.server.test_chat import one_by_one

pytest.importorskip("PIL.Image", reason="Pillow decodes the images: pip install pillow")

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
COUNT, ESTIMATE = "/v1/messages/count_tokens", "/v1/tokenizers/estimate-token-count"
SHOWN = "</think>A cat.<|im_end|>"
REMOTE = "https://example.com/cat.png"
# Where an image is, in each dialect, when it is the first part of a message.
CHAT_URL, RESPONSE_URL = "messages[0].content[0].image_url.url", "input[0].content[0].image_url"
SOURCE = "messages[0].content[0].source"


PICTURE = picture(32, 48)  # two tokens wide, two high: rows and columns of zeros are added
PNG = png(PICTURE)
BOMB = png(PICTURE, claimed=(60_000, 60_000))


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image_url(url: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri(PNG) if url is None else url, **more}}


def input_image(**fields: Any) -> dict[str, Any]:
    return {"type": "input_image", **(fields or {"image_url": uri(PNG)})}


def block(**source: Any) -> dict[str, Any]:
    return {"type": "image", "source": source or {"type": "base64", "media_type": "image/png", "data": coded(PNG)}}


def chat(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"model": "k2", "messages": [{"role": "user", "content": [*parts]}], **more}


def response(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"model": "k2", "input": [{"role": "user", "content": [*parts]}], **more}


def message(*blocks: Any, **more: Any) -> dict[str, Any]:
    return {"model": "k2", "max_tokens": 50, "messages": [{"role": "user", "content": [*blocks]}], **more}


@pytest.fixture
def service(tokenizer: Tokenizer) -> ScriptedService:
    """A model that sees, with replies to many requests."""
    service = ScriptedService(tokenizer)
    service.images = ImageFormat()
    service.scripts = [Script(one_by_one(tokenizer, SHOWN)) for _ in range(20)]
    return service


def seen(service: ScriptedService) -> list[str | Image]:
    """Return the texts and images of the last request, in their order."""
    parts: list[str | Image] = []
    for one in service.requests[-1].messages or ():
        content = one.get("content") or []
        parts += [content] if isinstance(content, str) else [part.get("image", part.get("text")) for part in content]
    return parts


def check_picture(image: Any, pixels: NDArray[np.uint8] = PICTURE) -> None:
    height, width, _ = pixels.shape
    assert isinstance(image, Image)
    assert image.pixels.shape == (-(-height // 28) * 28, -(-width // 28) * 28, 3)
    assert (image.pixels[:height, :width] == pixels).all()
    assert not image.pixels[height:].any()
    assert not image.pixels[:, width:].any()


def upload(client: Client, content: bytes = PNG, purpose: str = "image", **more: Any) -> httpx.Response:
    return client.post("/v1/files", files={"file": ("cat.png", content)}, data={"purpose": purpose}, **more)


# What arrives


def test_a_chat_with_images(client: Client, service: ScriptedService) -> None:
    other = picture(100, 30, seed=1)
    body = chat(text("Look: "), image_url(), image_url(uri(png(other))), text("Which one?"))
    reply = client.post(CHAT, body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == "A cat."
    look, first, second, question = seen(service)
    assert (look, question) == ("Look: ", "Which one?")
    check_picture(first)
    check_picture(second, other)


@pytest.mark.parametrize(
    "part",
    [
        image_url(),
        {"type": "image_url", "image_url": {"url": uri(PNG), "detail": "low"}, "cache_control": {"type": "ephemeral"}},
        {"type": "image_url", "image_url": uri(PNG)},
        {"type": "image", "image": uri(PNG)},
    ],
)
def test_every_way_to_write_an_image_of_a_chat(client: Client, service: ScriptedService, part: Any) -> None:
    for streamed in (False, True):
        assert client.post(CHAT, chat(part, stream=streamed)).status_code == 200
        (image,) = seen(service)
        check_picture(image)


def test_images_of_tools_and_of_the_system(client: Client, service: ScriptedService) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "draw", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": [image_url()]},
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": [text("done"), image_url()]},
    ]
    reply = client.post(CHAT, {"model": "k2", "messages": messages})
    assert reply.status_code == 200, reply.text
    first, _, _, second = seen(service)
    check_picture(first)
    check_picture(second)


def test_a_response_with_images(client: Client, service: ScriptedService) -> None:
    body = response({"type": "input_text", "text": "Look: "}, input_image(image_url=uri(PNG), detail="auto"))
    call = {"type": "function_call", "call_id": "c", "name": "draw", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": [input_image()]}
    body["input"] += [call, output]
    reply = client.post(RESPONSES, body)
    assert reply.status_code == 200, reply.text
    words, image, result = seen(service)
    assert words == "Look: "
    check_picture(image)
    check_picture(result)


def test_a_message_with_images(client: Client, service: ScriptedService) -> None:
    body = message(text("Draw: "), block())
    body["messages"] += [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "draw", "input": {}}]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c", "content": [text("one"), text("two"), block()]}],
        },
    ]
    reply = client.post(MESSAGES, body)
    assert reply.status_code == 200, reply.text
    words, image, one, two, result = seen(service)
    assert (words, one, two) == ("Draw: ", "one\n", "two\n")
    check_picture(image)
    check_picture(result)


def test_a_failed_tool_with_an_image_says_so_first(client: Client, service: ScriptedService) -> None:
    result = {"type": "tool_result", "tool_use_id": "c", "content": [block(), text("late")], "is_error": True}
    assert client.post(MESSAGES, message(result)).status_code == 200
    error, image, late = seen(service)
    assert (error, late) == ("Error: ", "late")
    check_picture(image)


def test_images_count_as_the_tokens_that_they_take(client: Client, service: ScriptedService) -> None:
    """Four more tokens than an image of one token, in the usage and in both routes that count."""
    small = noise_png(28, 28)

    def used(data: bytes) -> int:
        return int(client.post(CHAT, chat(image_url(uri(data)))).json()["usage"]["prompt_tokens"])

    def counted(data: bytes) -> int:
        source = {"type": "base64", "media_type": "image/png", "data": coded(data)}
        body = {"model": "k2", "messages": message(block(**source))["messages"]}
        return int(client.post(COUNT, body).json()["input_tokens"])

    def estimated(data: bytes) -> int:
        return int(client.post(ESTIMATE, chat(image_url(uri(data)))).json()["data"]["total_tokens"])

    for count in (used, counted, estimated):
        assert count(noise_png(80, 28)) - count(small) == 2
        assert count(PNG) - count(small) == 3
    assert estimated(PNG) == used(PNG)


def test_models_say_whether_they_see(client: Client, make_client: Callable[..., Client], tokenizer: Tokenizer) -> None:
    assert client.get("/v1/models").json()["data"][0]["supports_image_in"] is True
    assert client.get("/v1/models/k2").json()["supports_video_in"] is False
    assert make_client(ready=False).get("/v1/models/k2").json()["supports_image_in"] is False


# The official SDKs


def test_the_openai_sdk(service: ScriptedService) -> None:
    openai = pytest.importorskip("openai")
    with site(service) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        reply = sdk.chat.completions.create(**chat(text("Look: "), image_url()))
        assert reply.choices[0].message.content == "A cat."
        check_picture(seen(service)[1])
        reply = sdk.responses.create(**response(input_image(image_url=uri(PNG), detail="high")))
        assert reply.output_text == "A cat."
        check_picture(seen(service)[0])
        file = sdk.files.create(file=("cat.png", PNG), purpose="vision")
        sdk.responses.create(**response(input_image(file_id=file.id, detail="auto")))
        check_picture(seen(service)[0])
        with pytest.raises(openai.BadRequestError, match="opens no connection") as caught:
            sdk.chat.completions.create(**chat(image_url(REMOTE)))
        assert caught.value.param == CHAT_URL


def test_the_anthropic_sdk(service: ScriptedService) -> None:
    anthropic = pytest.importorskip("anthropic")
    result = {"type": "tool_result", "tool_use_id": "c", "content": [block()]}
    with site(service) as (url, _), anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as sdk:
        reply = sdk.messages.create(**message(text("Look: "), block()))
        assert reply.content[-1].text == "A cat."
        check_picture(seen(service)[1])
        sdk.messages.create(**message(result))
        check_picture(seen(service)[0])
        counted = sdk.messages.count_tokens(model="k2", messages=message(block())["messages"])
        usage = sdk.messages.create(**message(block())).usage
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
        with pytest.raises(anthropic.BadRequestError, match="opens no connection"):
            sdk.messages.create(**message(block(type="url", url=REMOTE)))


# Files


def test_the_life_of_a_file_with_an_image(client: Client, service: ScriptedService) -> None:
    for purpose in ("image", "vision"):
        created = upload(client, purpose=purpose).json()
        file_id = created["id"]
        assert (created["bytes"], created["purpose"]) == (len(PNG), purpose)
        content = client.get(f"/v1/files/{file_id}/content")
        assert content.content == PNG
        assert content.headers["content-type"] == "application/octet-stream"
        assert content.headers["content-disposition"] == "attachment"
        for path, body in (
            (CHAT, chat(image_url(f"ms://{file_id}"))),
            (RESPONSES, response(input_image(file_id=file_id))),
            (MESSAGES, message(block(type="file", file_id=file_id))),
        ):
            reply = client.post(path, body)
            assert reply.status_code == 200, reply.text
            check_picture(seen(service)[0])
        client.request("DELETE", f"/v1/files/{file_id}")
        assert client.post(CHAT, chat(image_url(f"ms://{file_id}"))).status_code == 400


def test_a_file_must_be_an_image_of_the_same_key(make_client: Callable[..., Client]) -> None:
    client = make_client(api_keys=("anna", "ben"))
    anna, ben = ({"x-api-key": key} for key in ("anna", "ben"))
    image = upload(client, headers=anna).json()["id"]
    words = upload(client, b"text", "file-extract", headers=anna).json()["id"]
    place = "messages[0].content[0].image_url.url"
    assert client.post(CHAT, chat(image_url(f"ms://{image}")), headers=anna).status_code == 200
    for file_id, key in ((image, ben), (words, anna), ("file-0", anna), ("", anna), ("../" + image, anna)):
        refused = client.post(CHAT, chat(image_url(f"ms://{file_id}")), headers=key)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, place)


@pytest.mark.parametrize("content", [b"", b"text", PNG[:60], BOMB, b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_what_is_no_image_is_not_kept(client: Client, content: bytes) -> None:
    refused = upload(client, content)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file"), refused.text
    assert client.get("/v1/files").json()["data"] == []


def test_images_are_kept_where_a_model_sees_them(make_client: Callable[..., Client], service: ScriptedService) -> None:
    assert upload(make_client(ready=False)).status_code == 503
    service.images = None
    refused = upload(make_client())
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "purpose")
    assert "reads text only" in refused.json()["error"]["message"]


# What is refused

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


# What it costs


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
    read_image = server_images.read_image

    def slow(*given: Any) -> Image:
        begun.set()
        assert go_on.wait(50)
        return read_image(*given)

    monkeypatch.setattr(server_images, "read_image", slow)

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
    read_image = server_images.read_image

    def slow(*given: Any) -> Image:
        read.append(given[-1])
        begun.set()
        assert go_on.wait(50)
        return read_image(*given)

    monkeypatch.setattr(server_images, "read_image", slow)
    body = json.dumps(chat(*[image_url()] * 5)).encode()

    async def call() -> None:
        sent, gone = False, asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            raise AssertionError("nobody is there")

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
                 "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("localhost", 80),
                 "client": ("127.0.0.1", 5), "root_path": ""}  # fmt: skip
        work = asyncio.ensure_future(client.app(scope, receive, send))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        gone.set()
        await work
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

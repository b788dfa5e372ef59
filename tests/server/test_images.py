"""Images in requests: each dialect, and the official SDKs, show the model the picture that was sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hybrid_k2.protocol import Tokenizer
from tests.pictures import coded, noise_png, picture, png, uri
from tests.server.browser import site
from tests.server.conftest import Client
from tests.server.image_requests import (
    CHAT,
    CHAT_URL,
    COUNT,
    ESTIMATE,
    MESSAGES,
    PNG,
    REMOTE,
    RESPONSES,
    block,
    chat,
    check_picture,
    image_url,
    input_image,
    message,
    response,
    seen,
    text,
)
from tests.server.scripted import ScriptedService

pytest.importorskip("PIL.Image", reason="Pillow decodes the images: pip install pillow")
pytestmark = pytest.mark.usefixtures("seeing")


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

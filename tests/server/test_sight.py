"""A server process with a model that sees: what an image does to a reply, in every dialect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.generators import write_checkpoint
from tests.pictures import coded, noise_png, uri
from tests.server.processes import serving

pytest.importorskip("PIL.Image", reason="Pillow decodes the images: pip install pillow")

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PICTURES = [noise_png(60, 90, seed) for seed in range(3)]  # 3 x 4 tokens


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("server")
    model = write_checkpoint(folder / "model", seed=3, num_hidden_layers=2)
    with serving(folder, model=model) as process:
        process.wait_ready()
        with httpx.Client(base_url=process.url, timeout=120) as client:
            yield client


def asked(server: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = server.post(path, json={"model": "model", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def question(data: bytes) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": uri(data)}}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": parts}]


def chat(data: bytes, **more: Any) -> dict[str, Any]:
    thinking = {"type": "disabled"}
    return {"messages": question(data), "max_tokens": 4, "ignore_eos": True, "thinking": thinking, **more}


def test_the_image_decides_the_reply(server: httpx.Client) -> None:
    assert server.get("/v1/models").json()["data"][0]["supports_image_in"] is True
    replies = [asked(server, CHAT, chat(data, logprobs=True)) for data in (*PICTURES, PICTURES[0])]
    logprobs = [[token["logprob"] for token in reply["choices"][0]["logprobs"]["content"]] for reply in replies]
    assert len({tuple(row) for row in logprobs[:3]}) == 3
    used = [reply["usage"] for reply in replies]
    assert len({usage["prompt_tokens"] for usage in used}) == 1
    assert used[3]["cached_tokens"] >= used[1]["cached_tokens"] + 12, "the image is known again, and no other one"


def test_every_dialect_shows_the_same_prompt(server: httpx.Client) -> None:
    data = PICTURES[0]
    reply = asked(server, CHAT, chat(data))
    source = {"type": "base64", "media_type": "image/png", "data": coded(data)}
    text = "What is it?"
    message = asked(
        server,
        MESSAGES,
        {
            "max_tokens": 4,
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": text}]}
            ],
        },
    )
    parts = [{"type": "input_image", "image_url": uri(data)}, {"type": "input_text", "text": text}]
    response = asked(
        server,
        RESPONSES,
        {"input": [{"role": "user", "content": parts}], "max_output_tokens": 4, "reasoning": {"effort": "none"}},
    )
    usage = message["usage"]
    prompts = {
        reply["usage"]["prompt_tokens"],
        usage["input_tokens"] + usage["cache_read_input_tokens"],
        response["usage"]["input_tokens"],
    }
    assert len(prompts) == 1
    assert usage["cache_read_input_tokens"] >= 12, "it is the prompt of the chat before"
    counted = {"model": "model", "messages": question(data), "thinking": {"type": "disabled"}}
    estimate = server.post("/v1/tokenizers/estimate-token-count", json=counted).json()
    assert {estimate["data"]["total_tokens"]} == prompts


def test_a_damaged_image_ends_one_request_alone(server: httpx.Client) -> None:
    refused = server.post(CHAT, json=chat(PICTURES[0][:80]))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages[0].content[0].image_url.url"
    asked(server, CHAT, chat(PICTURES[0]))

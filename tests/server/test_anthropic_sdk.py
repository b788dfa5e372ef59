"""The official Anthropic SDK against a real server process with the demo model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.processes import serving

anthropic = pytest.importorskip("anthropic")

CALCULATOR: Any = {
    "name": "calculator",
    "description": "Compute an arithmetic expression.",
    "input_schema": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
}
THINK: Any = {"type": "enabled", "budget_tokens": 1024}
SUM: Any = {
    "model": "demo",
    "max_tokens": 2000,
    "extra_body": {"temperature": 0},
    "messages": [{"role": "user", "content": "What is 17 + 25?"}],
}
PRODUCT: Any = {**SUM, "messages": [{"role": "user", "content": "What is 3481 * 27?"}], "tools": [CALCULATOR]}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server"), "--api-key", "test-key") as server:
        server.wait_ready()
        yield server.url


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=url, api_key="test-key", timeout=120, max_retries=0) as client:
        yield client


def test_a_message(client: Any) -> None:
    reply = client.messages.create(**SUM, thinking=THINK)
    thinking, text = reply.content
    assert (thinking.type, text.type) == ("thinking", "text")
    assert text.text == "17 + 25 = 42"
    assert reply.stop_reason == "end_turn"
    assert reply.usage.output_tokens > 10


def test_counting_tokens(client: Any) -> None:
    counted = client.messages.count_tokens(model="demo", messages=SUM["messages"]).input_tokens
    usage = client.messages.create(**SUM).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_a_stream_equals_the_message(client: Any) -> None:
    whole = client.messages.create(**SUM, thinking=THINK)
    with client.messages.stream(**SUM, thinking=THINK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[1].text
    assert [block.model_dump() for block in final.content] == [block.model_dump() for block in whole.content]
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.cache_read_input_tokens > 0


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_round_trip(client: Any, streamed: bool) -> None:
    if streamed:
        with client.messages.stream(**PRODUCT, thinking=THINK) as stream:
            reply = stream.get_final_message()
    else:
        reply = client.messages.create(**PRODUCT, thinking=THINK)
    assert reply.stop_reason == "tool_use"
    (use,) = [block for block in reply.content if block.type == "tool_use"]
    assert use.name == "calculator"
    assert use.input.keys() == {"expression"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": '{"result": 93987}'}
    messages = [
        *PRODUCT["messages"],
        {"role": "assistant", "content": reply.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(**{**PRODUCT, "messages": messages}, thinking=THINK)
    assert "93987" in answer.content[-1].text.replace(",", "")


def test_a_forced_call(client: Any) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "calculator"}):
        reply = client.messages.create(**{**PRODUCT, "messages": SUM["messages"]}, tool_choice=choice)
        assert reply.stop_reason == "tool_use"
        assert reply.content[-1].input.keys() == {"expression"}


def test_limits_and_stops(client: Any) -> None:
    short = client.messages.create(**{**SUM, "max_tokens": 3})
    assert short.stop_reason == "max_tokens"
    stopped = client.messages.create(**SUM, thinking=THINK, stop_sequences=["="])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "=")
    assert stopped.content[-1].text == "17 + 25 "


def test_errors(client: Any, url: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**{**SUM, "extra_body": {"temperature": -1}})
    with pytest.raises(anthropic.NotFoundError, match="no-such-model"):
        client.messages.create(**{**SUM, "model": "no-such-model"})
    stranger = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(**SUM)


def test_asynchronous_messages_side_by_side(url: str, client: Any) -> None:
    questions = [{**SUM, "messages": [{"role": "user", "content": f"What is {left} + 25?"}]} for left in range(10, 13)]

    async def answer(many: Any, question: Any) -> str:
        async with many.messages.stream(**question) as stream:
            return "".join([text async for text in stream.text_stream])

    async def all_at_once() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="test-key", timeout=120, max_retries=0) as many:
            return await asyncio.gather(*(answer(many, question) for question in questions))

    for question, text in zip(questions, asyncio.run(all_at_once()), strict=True):
        assert text == client.messages.create(**question).content[0].text

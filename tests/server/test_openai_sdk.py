"""The official OpenAI SDK against a real server process with the demo model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.processes import serving

openai = pytest.importorskip("openai")

CALCULATOR: Any = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Compute an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
SUM: Any = [{"role": "user", "content": "What is 17 + 25?"}]
PRODUCT: Any = [{"role": "user", "content": "What is 3481 * 27?"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server"), "--api-key", "test-key") as server:
        server.wait_ready()
        yield server.url


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="test-key", timeout=120, max_retries=0) as client:
        yield client


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"


def test_a_chat(client: Any) -> None:
    reply = client.chat.completions.create(model="demo", messages=SUM, temperature=0)
    assert reply.choices[0].message.content == "17 + 25 = 42"
    assert reply.choices[0].message.reasoning_content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0


def test_a_stream_equals_the_reply(client: Any) -> None:
    asked = {"model": "demo", "messages": SUM, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    content, reasoning, usage = "", "", None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        usage = chunk.usage or usage
    assert content == whole.choices[0].message.content
    assert reasoning == whole.choices[0].message.reasoning_content
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0, "the prompt is there from the request before"


def test_tools_round_trip(client: Any) -> None:
    messages = list(PRODUCT)
    reply = client.chat.completions.create(model="demo", messages=messages, tools=[CALCULATOR], temperature=0)
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "calculator"
    assert json.loads(call.function.arguments).keys() == {"expression"}
    messages.append(reply.choices[0].message)
    messages.append({"role": "tool", "tool_call_id": call.id, "content": '{"result": 93987}'})
    reply = client.chat.completions.create(model="demo", messages=messages, tools=[CALCULATOR], temperature=0)
    assert "93987" in reply.choices[0].message.content.replace(",", "")


def test_tools_streamed(client: Any) -> None:
    asked = {"model": "demo", "messages": PRODUCT, "tools": [CALCULATOR], "temperature": 0}
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    whole = client.chat.completions.create(**asked).choices[0].message.tool_calls[0]
    assert (streamed.id, streamed.function.name) == (whole.id, whole.function.name)
    assert streamed.function.arguments == whole.function.arguments


def test_a_forced_call(client: Any) -> None:
    chosen = {"type": "function", "function": {"name": "calculator"}}
    for choice in ("required", chosen):
        reply = client.chat.completions.create(
            model="demo", messages=SUM, tools=[CALCULATOR], tool_choice=choice, temperature=0
        )
        assert reply.choices[0].finish_reason == "tool_calls"
        (call,) = reply.choices[0].message.tool_calls
        assert json.loads(call.function.arguments).keys() == {"expression"}


def test_structured_output(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}, "sure": {"type": "boolean"}},
        "required": ["sum", "sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(model="demo", messages=SUM, response_format=wanted, temperature=0)
    answer = json.loads(reply.choices[0].message.content)
    assert isinstance(answer["sum"], int)
    assert isinstance(answer["sure"], bool)
    assert reply.choices[0].message.reasoning_content, "the thinking stays free"
    reply = client.chat.completions.create(
        model="demo", messages=SUM, response_format={"type": "json_object"}, temperature=0, max_tokens=200
    )
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content), dict)
    with pytest.raises(openai.BadRequestError, match=r"response_format\.json_schema"):
        client.chat.completions.create(
            model="demo",
            messages=SUM,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}},
        )


def test_a_schema_that_cannot_be_followed_ends_its_request_alone(client: Any) -> None:
    endless = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(model="demo", messages=SUM, response_format=endless, temperature=0)
    assert client.chat.completions.create(model="demo", messages=SUM, temperature=0, max_tokens=5).choices


def test_several_choices_with_a_seed_repeat(client: Any) -> None:
    asked = {"model": "demo", "messages": SUM, "n": 3, "seed": 11, "max_tokens": 12, "temperature": 3.0, "top_p": 1.0}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [[choice.message.reasoning_content for choice in reply.choices] for reply in (first, again)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    assert first.choices[0].finish_reason == "length"


def test_log_probabilities(client: Any) -> None:
    reply = client.chat.completions.create(
        model="demo", messages=SUM, temperature=0, logprobs=True, top_logprobs=3, max_tokens=8
    )
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == 8
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.token == token.top_logprobs[0].token, "temperature 0 takes the likeliest"
        assert token.logprob <= 0


def test_completions(client: Any) -> None:
    asked = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2, echo=False)
    assert whole.choices[0].finish_reason == "length"
    assert "".join(whole.choices[0].logprobs.tokens) == whole.choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    assert streamed == whole.choices[0].text
    echoed = client.completions.create(**asked, echo=True)
    assert echoed.choices[0].text == "Once upon a time" + whole.choices[0].text
    scored = client.completions.create(**asked, logprobs=2, echo=True)
    assert scored.choices[0].text == echoed.choices[0].text
    logprobs = scored.choices[0].logprobs
    assert "".join(logprobs.tokens) == scored.choices[0].text
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert all(len(top) == 2 for top in logprobs.top_logprobs[1:])
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    assert logprobs.token_logprobs[-12:] == pytest.approx(whole.choices[0].logprobs.token_logprobs, abs=1e-4)
    both = client.completions.create(**asked, logprobs=2, echo=True, n=2, seed=1)
    first, second = (choice.logprobs.token_logprobs for choice in both.choices)
    assert len(first) == len(logprobs.tokens)
    assert second == first, "at temperature 0"
    several = client.completions.create(**{**asked, "prompt": ["Once upon a time", "hello"]}, n=2, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == whole.choices[0].text


def test_errors(client: Any, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=SUM, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=SUM)
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.completions.create(model="demo", prompt=[10**6], max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="demo", messages=SUM, max_tokens=10**7)
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_asynchronous_streams_side_by_side(url: str, client: Any) -> None:
    questions = [f"What is {left} + 25?" for left in range(10, 14)]

    async def answer(caller: Any, question: str) -> str:
        stream = await caller.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": question}], temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="test-key", timeout=120, max_retries=0) as many:
            return await asyncio.gather(*(answer(many, question) for question in questions))

    together = asyncio.run(all_at_once())
    for question, text in zip(questions, together, strict=True):
        alone = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": question}], temperature=0
        )
        assert text == alone.choices[0].message.content


def test_responses(client: Any) -> None:
    asked = {"model": "demo", "input": "What is 17 + 25?", "temperature": 0}
    whole = client.responses.create(**asked)
    assert whole.output_text == "17 + 25 = 42"
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    with client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_tools_of_responses_round_trip(client: Any) -> None:
    tools = [{"type": "function", **CALCULATOR["function"]}]
    history: list[Any] = [{"role": "user", "content": "What is 3481 * 27?"}]
    reply = client.responses.create(model="demo", input=history, tools=tools, temperature=0)
    (call,) = [item for item in reply.output if item.type == "function_call"]
    history += [item.to_dict() for item in reply.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": '{"result": 93987}'})
    reply = client.responses.create(model="demo", input=history, tools=tools, temperature=0)
    assert "93987" in reply.output_text.replace(",", "")

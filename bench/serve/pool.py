"""The requests of a soak: good ones, each with a seed, and malformed ones."""

from __future__ import annotations

import json
import random
from typing import Any

from bench.serve.http import get, post

_TOPICS = ("the sea", "an old clock", "a fox", "the first snow", "a lighthouse", "two brothers", "a bakery", "the moon")
_WORDS = ("river", "stone", "light", "paper", "green", "seven", "walk", "under", "never", "open", "small", "winter")
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def good_requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Return chats of six kinds, in turns, with prompts of a few to some hundreds of tokens."""
    chance = random.Random(seed)
    return [_good(index, chance) for index in range(count)]


def _good(index: int, chance: random.Random) -> dict[str, Any]:
    a, b, topic = chance.randrange(100), chance.randrange(100), chance.choice(_TOPICS)
    request: dict[str, Any] = {"seed": chance.randrange(2**31), "max_tokens": chance.randrange(8, 97)}
    say = f"What is {a} + {b}?"
    match index % 6:
        case 0:
            say = f"Tell me a story about {topic}."
        case 1:
            request |= {"thinking": {"type": "disabled"}, "ignore_eos": True}
        case 2:
            words = " ".join(chance.choices(_WORDS, k=chance.randrange(100, 600)))
            say = f"{words}\n\nHow does this go on?"
        case 3:
            say = f"How is the weather in {topic.title()}?"
            request |= {"tools": [_TOOL], "tool_choice": "required", "thinking": {"type": "disabled"}}
        case 4:
            schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": _SCHEMA, "strict": True}}
            request |= {"response_format": schema, "max_tokens": 96}
        case 5:
            request |= {"n": 2, "temperature": 1.5, "logprobs": True, "top_logprobs": 2}
    return {**request, "messages": [{"role": "user", "content": say}]}


def _malformed() -> dict[str, bytes]:
    """Return requests by what is wrong with them."""
    hello = {"messages": [{"role": "user", "content": "hi"}]}
    bodies = {
        "half an object": b'{"messages": [',
        "no JSON": b"\x00\xff\xfe",
        "no UTF-8": b'{"messages": [{"role": "user", "content": "\xc3\x28"}]}',
        "a number": b"17",
        "very deep": b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        "no messages": b"{}",
        "messages of a wrong type": json.dumps({"messages": "hi"}).encode(),
        "an unknown role": json.dumps({"messages": [{"role": "king", "content": "hi"}]}).encode(),
        "an unknown field": json.dumps({**hello, "colour": "red"}).encode(),
        "too many choices": json.dumps({**hello, "n": 1000}).encode(),
        "a wrong number": json.dumps({**hello, "temperature": "hot"}).encode(),
        "a wrong schema": json.dumps(
            {**hello, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}}
        ).encode(),
        "another model": json.dumps({**hello, "model": "no-such-model"}).encode(),
    }
    requests = {name: post(body) for name, body in bodies.items()}
    requests["no such route"] = post(b"{}", "/v1/nothing")
    requests["another method"] = get("/v1/chat/completions")
    requests["no HTTP"] = b"HELLO\r\n\r\n"
    return requests


MALFORMED = _malformed()  # must be answered with a status of 400 to 499

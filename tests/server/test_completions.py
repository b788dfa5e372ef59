"""Text completions against a scripted service."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid_k2.protocol import Tokenizer
from hybrid_k2.protocol.tokenizer import WINDOW_CHARS
from tests.server.conftest import Client
from tests.server.scripted import Script, ScriptedService

PATH = "/v1/completions"
ONCE: dict[str, Any] = {"model": "k2", "prompt": "Once"}


def one_by_one(tokenizer: Tokenizer, text: str) -> Script:
    return Script([[token] for token in tokenizer.encode(text)])


def texts(frames: list[dict[str, Any]]) -> dict[int, str]:
    joined: dict[int, str] = {}
    for frame in frames:
        for choice in frame["choices"]:
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined


def test_prompts_of_every_form(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Once upon")
    for prompt, prompts in (
        ("Once", ["Once"]),
        (["Once", "Twice"], ["Once", "Twice"]),
        (ids, [ids]),
        ([ids, ids[:1]], [ids, ids[:1]]),
    ):
        service.requests.clear()
        service.scripts = [one_by_one(tokenizer, " a time") for _ in range(2 * len(prompts))]
        body = client.post(PATH, {**ONCE, "prompt": prompt, "n": 2, "echo": True}).json()
        assert [request.prompt for request in service.requests] == prompts
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(prompts)))
        shown = [one if isinstance(one, str) else tokenizer.decode(one) for one in prompts for _ in range(2)]
        assert [choice["text"] for choice in body["choices"]] == [f"{one} a time" for one in shown]
        assert body["usage"]["completion_tokens"] == 2 * len(prompts) * len(tokenizer.encode(" a time"))


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_says_the_same(client: Client, service: ScriptedService, tokenizer: Tokenizer, echo: bool) -> None:
    asked = {**ONCE, "prompt": ["Once", "Twice"], "n": 2, "echo": echo}
    replies = [" a", " b 🙂", " c", " d"]
    service.scripts = [one_by_one(tokenizer, reply) for reply in replies * 2]
    whole = client.post(PATH, asked).json()
    *frames, last = client.frames(PATH, {**asked, "stream_options": {"include_usage": True}})
    assert texts(frames) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    ends = [choice["index"] for frame in frames for choice in frame["choices"] if choice["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


def test_log_probabilities(client: Client, service: ScriptedService, tokenizer: Tokenizer) -> None:
    text = " a time 🙂 ago"
    service.scripts = [one_by_one(tokenizer, text) for _ in range(2)]
    whole = client.post(PATH, {**ONCE, "logprobs": 1}).json()["choices"][0]["logprobs"]
    count = len(tokenizer.encode(text))
    assert len(whole["tokens"]) == len(whole["token_logprobs"]) == len(whole["text_offset"]) == count
    for token, offset in zip(whole["tokens"], whole["text_offset"], strict=True):
        assert text[offset:].startswith("🙂" if token.startswith("bytes:") else token)
    streamed: dict[str, list[Any]] = {}
    for frame in client.frames(PATH, {**ONCE, "logprobs": 1}):
        for name, values in (frame["choices"][0]["logprobs"] or {}).items():
            streamed.setdefault(name, []).extend(values)
    assert streamed == whole


def test_for_its_first_token_a_long_prompt_is_not_encoded_to_its_end(
    client: Client, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, counts = Tokenizer.encode, []

    def counted(tokenizer: Tokenizer, text: str, *more: Any, **names: Any) -> list[int]:
        ids = encode(tokenizer, text, *more, **names)
        counts.append(len(ids))
        return ids

    monkeypatch.setattr(Tokenizer, "encode", counted)
    service.scripts = [Script()]
    prompt = "1 " * WINDOW_CHARS
    response = client.post(PATH, {**ONCE, "prompt": prompt, "echo": True, "logprobs": 0})
    assert response.json()["choices"][0]["logprobs"]["tokens"] == ["1"]
    assert 0 < counts[0] <= WINDOW_CHARS, "before the service sees it"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[5], [10**9]]}, "prompt[1]"),
        ({"prompt": [5] * 4097}, "prompt"),
        ({"prompt": [[5], [10**9] * 4097]}, "prompt[1]"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": ["a"] * 3, "n": 6}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": 1, "echo": True, "stream": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream_options": {}}, "stream_options"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_wrong_parameter_is_named(client: Client, change: dict[str, Any], param: str) -> None:
    response = client.post(PATH, {**ONCE, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param

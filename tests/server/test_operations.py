"""Keys, health, metrics, models, request ids, CORS, and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hybrid_k2.engine.service_types import QueueFullError, ServiceClosingError
from hybrid_k2.errors import ConfigError, ContextLengthError, RequestError
from hybrid_k2.protocol import encode_prompt
from hybrid_k2.server import openai_chat
from hybrid_k2.server.options import ServerOptions
from hybrid_k2.server.request_log import JsonLines, TextLines
from tests.conftest import REPO
from tests.server.conftest import Client, run
from tests.server.scripted import Script, ScriptedService
from tests.server.test_chat import HELLO, PATH, THOUGHT, WEATHER, one_by_one

NAME = re.compile(r"hybrid_k2_\w+")
MakeClient = Callable[..., Client]
ROUTES = [
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/hybrid-k2/status"),
    ("GET", "/v1/hybrid-k2/experts"),
    ("GET", "/v1/models/k2"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/nothing"),
    ("POST", PATH),
    ("POST", "/v1/completions"),
    ("POST", "/v1/tokenizers/estimate-token-count"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("DELETE", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/anthropic/v1/messages"),
    ("POST", "/anthropic/v1/messages/count_tokens"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_keys_guard_every_route(make_client: MakeClient, method: str, path: str) -> None:
    client = make_client(api_keys=("first-key", "second-key"))
    for headers in (
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Bearer first-keyy"},
        {"authorization": "Basic first-key"},
        {"x-api-key": "third"},
    ):
        response = client.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["message"].startswith("API key: ")
        assert response.headers["www-authenticate"] == "Bearer"
    for headers in (
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer second-key"},
        {"x-api-key": "first-key"},
    ):
        assert client.request(method, path, headers=headers).status_code != 401


def test_every_route_is_guarded_by_the_test_above(client: Client) -> None:
    paths = set(client.get("/openapi.json").json()["paths"]) - {"/health", "/v1/models/{name}"}
    assert paths <= {path for _, path in ROUTES}


def test_health_needs_no_key(make_client: MakeClient) -> None:
    assert make_client(api_keys=("key",)).get("/health").status_code == 200


def test_the_key_is_the_owner_of_a_request(make_client: MakeClient, service: ScriptedService, tokenizer: Any) -> None:
    client = make_client(api_keys=("first-key", "second-key"))
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT)) for _ in range(3)]
    for key in ("first-key", "second-key", "first-key"):
        client.post(PATH, {**HELLO, "cache_salt": "s"}, headers={"authorization": f"Bearer {key}"})
    first, second, again = service.requests
    assert first.key == again.key != second.key
    assert first.cache_salt == again.cache_salt != second.cache_salt
    assert "first" not in first.key


def test_a_reply_has_the_name_that_its_request_used(
    make_client: MakeClient, service: ScriptedService, tokenizer: Any
) -> None:
    client = make_client(model_names=("first", "second"))
    for asked, said in ((None, "first"), ("first", "first"), ("second", "second")):
        service.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
        assert client.post(PATH, {**HELLO, "model": asked}).json()["model"] == said


@pytest.mark.parametrize("key", ["", "with space", "ümlaut", "line\n"])
def test_keys_that_no_header_can_hold(key: str) -> None:
    with pytest.raises(ConfigError, match="API key 2"):
        ServerOptions(model_names=("k2",), api_keys=("good", key))


@pytest.mark.parametrize(
    "origin", ["", "example.com", "https://example.com/", "https://example.com/app", "https://", "https://a b"]
)
def test_origins_that_no_page_has(origin: str) -> None:
    with pytest.raises(ConfigError, match="CORS origin: expected scheme and host"):
        ServerOptions(model_names=("k2",), cors_origins=("https://page", origin))


def test_health_while_loading_serving_and_draining(make_client: MakeClient) -> None:
    client = make_client(ready=False)
    response = client.get("/health")
    assert response.status_code == 503
    assert response.json()["progress"] == {"read_bytes": 0, "total_bytes": 0, "share": 0.0}
    client.backend.report_loading(25, 100)
    assert client.get("/health").json()["progress"]["share"] == 0.25
    response = client.post(PATH, HELLO)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
    assert "retry-after" in response.headers
    assert client.get("/v1/models").status_code == 200

    client = make_client()
    assert client.get("/health").json()["status"] == "ok"
    client.backend.drain()
    assert client.get("/health").json()["status"] == "draining"
    response = client.post(PATH, HELLO)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/gpt-9", "/", "/openapi.json"])
def test_what_can_be_got_can_be_asked_for_without_a_body(client: Client, path: str) -> None:
    whole, head = client.get(path), client.request("HEAD", path)
    assert head.status_code == whole.status_code
    for name in ("content-type", "content-length"):
        assert head.headers[name] == whole.headers[name]
    assert head.content == b""


def test_metrics(client: Client, service: ScriptedService, tokenizer: Any) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT)) for _ in range(2)]
    client.post(PATH, HELLO)
    client.frames(PATH, HELLO)
    client.get("/v1/made-up-by-a-client")
    client.post(PATH, {})
    text = client.get("/metrics").text
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["hybrid_k2_http_responses_total", PATH, "200"] == 2  # type: ignore[index]
    assert values["hybrid_k2_http_responses_total", PATH, "400"] == 1  # type: ignore[index]
    assert "made-up" not in text
    assert values["hybrid_k2_request_success_total", "stop"] == 2  # type: ignore[index]
    assert values["hybrid_k2_time_to_first_token_seconds_count",] == 2
    assert values["hybrid_k2_e2e_request_latency_seconds_count",] == 2
    assert values["hybrid_k2_kv_cache_usage_ratio",] == 0.25
    assert values["hybrid_k2_ready",] == 1


def test_every_metric_is_documented(client: Client) -> None:
    page = (REPO / "docs" / "serving.md").read_text()
    names = {family.name for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert not [name for name in names if f"`{name.removesuffix('_created')}" not in page]


def test_models(make_client: MakeClient) -> None:
    client = make_client(model_names=("moonshotai/Kimi-K2.6", "alias"))
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["moonshotai/Kimi-K2.6", "alias"]
    model = client.get("/v1/models/moonshotai/Kimi-K2.6").json()
    assert (model["object"], model["context_length"]) == ("model", 4096)


def test_counting_tokens(client: Client, service: ScriptedService, tokenizer: Any) -> None:
    body = {"messages": [{"role": "user", "content": "How many tokens?"}], "tools": [WEATHER]}
    counted = client.post("/v1/tokenizers/estimate-token-count", body).json()["data"]["total_tokens"]
    assert counted == len(encode_prompt(tokenizer, body["messages"], body["tools"]))


@pytest.mark.parametrize("path", ["/v1/tokenizers/estimate-token-count", "/v1/messages/count_tokens"])
def test_tokens_are_counted_up_to_some_contexts(client: Client, service: ScriptedService, path: str) -> None:
    bound = 4 * service.context_tokens
    for text, status in (("1 " * (bound // 2 - 50), 200), ("1 " * bound, 400)):
        response = client.post(path, {"model": "k2", "messages": [{"role": "user", "content": text}]})
        assert response.status_code == status, response.text
    assert response.json()["error"]["message"].startswith(f"messages: expected at most {bound} tokens")


def test_request_ids(client: Client) -> None:
    named = client.post("/v1/messages", {}).headers
    assert named["request-id"] == named["x-request-id"]
    assert "request-id" not in client.get("/health").headers
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("two words", "x" * 200, 'a"b'):
        assert client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"].startswith("req_")


def test_pages_may_call_only_where_they_are_let(make_client: MakeClient) -> None:
    ask = {"origin": "https://page", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in make_client().request("OPTIONS", PATH, headers=ask).headers
    client = make_client(cors_origins=("https://page",), api_keys=("key",))
    response = client.request("OPTIONS", PATH, headers=ask)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "https://page")
    other = client.request("OPTIONS", PATH, headers={**ask, "origin": "https://other"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origin", ["https://page", "null", "http://server.evil"])
def test_pages_from_elsewhere_are_refused_where_there_is_no_key(make_client: MakeClient, origin: str) -> None:
    headers = {"origin": origin}
    response = make_client().post(PATH, HELLO, headers=headers)
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "permission_error"
    assert make_client(cors_origins=(origin,)).get("/v1/models", headers=headers).status_code == 200
    assert make_client(cors_origins=("*",)).get("/v1/models", headers=headers).status_code == 200
    with_key = {**headers, "x-api-key": "key"}
    assert make_client(api_keys=("key",)).get("/v1/models", headers=with_key).status_code == 200


def test_an_origin_that_only_ends_as_the_server_s_own_is_refused(client: Client) -> None:
    assert client.get("/v1/models", headers={"origin": "http://evil/server"}).status_code == 403


def test_the_server_s_own_pages_may_call(client: Client) -> None:
    assert client.get("/v1/models", headers={"origin": "http://server"}).status_code == 200


def test_the_log_says_how_it_went_and_not_what_was_said(
    client: Client, service: ScriptedService, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
    with caplog.at_level(logging.INFO, "hybrid_k2.server"):
        client.post(
            PATH, {**HELLO, "messages": [{"role": "user", "content": "a secret"}]}, headers={"x-request-id": "r1"}
        )
    (record,) = [record for record in caplog.records if record.name == "hybrid_k2.server"]
    line = json.loads(JsonLines().format(record))
    assert line["request_id"] == "r1"
    assert (line["status"], line["route"], line["finish_reason"]) == (200, PATH, "stop")
    assert line["prompt_tokens"] == service.tickets[0].prompt_tokens
    assert line["completion_tokens"] > 3
    assert "r1" in TextLines().format(record)
    assert "secret" not in json.dumps(line) + TextLines().format(record)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"messages": "a secret"}, {"code": "invalid_value", "param": "messages"}),
        ({"messages": [{"role": "a secret"}]}, {"param": "messages[0].role"}),
        ({"a secret": 1}, {"code": "unknown_parameter"}),
        ({"response_format": {"type": "a secret"}}, {"param": "response_format.type"}),
        ({"tools": [WEATHER], "response_format": "a secret"}, {"param": "response_format"}),
        ({"logit_bias": {"a secret": 1}}, {"param": "logit_bias"}),
    ],
)
def test_the_log_does_not_quote_a_wrong_request(
    client: Client, caplog: pytest.LogCaptureFixture, change: dict[str, Any], facts: dict[str, str]
) -> None:
    with caplog.at_level(logging.INFO, "hybrid_k2.server"):
        response = client.post(PATH, {**HELLO, **change})
    (record,) = [record for record in caplog.records if record.name == "hybrid_k2.server"]
    line = json.loads(JsonLines().format(record))
    assert line["status"] == response.status_code
    assert facts.items() <= line.items()
    assert "secret" not in json.dumps(line)


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_does_not_quote_what_the_engine_says_of_a_request(
    client: Client, service: ScriptedService, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    wrong = RequestError("prompt: expected another, got 'a secret'")
    service.scripts = [Script(refusal=wrong), Script(error=wrong)]
    with caplog.at_level(logging.INFO, "hybrid_k2.server"):
        for _ in range(2):
            assert "a secret" in client.post(PATH, {**HELLO, "stream": stream}).text, "the client reads it"
    assert "secret" not in "".join(JsonLines().format(record) for record in caplog.records)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_meets_the_drain_is_told_so(client: Client, service: ScriptedService, stream: bool) -> None:
    """The server was ready when the request came, and its service no more when the prompt was encoded."""
    service.scripts = [Script(refusal=ServiceClosingError("service: it is shutting down"))]
    response = client.post(PATH, {**HELLO, "stream": stream})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert response.headers["retry-after"]


def test_a_reply_that_the_drain_cancels_is_told_so(client: Client, service: ScriptedService, tokenizer: Any) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT), finish_reason="cancelled")]
    response = client.post(PATH, HELLO)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert response.headers["retry-after"]


def test_a_request_that_outlives_the_server_is_told_so(client: Client) -> None:
    """Its body has not come when the server stops to wait."""

    async def cut_off() -> httpx.Response:
        waiting = asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            yield b"{"
            waiting.set()
            await asyncio.sleep(60)

        transport = httpx.ASGITransport(client.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            call = asyncio.ensure_future(http.post(PATH, content=parts()))
            await waiting.wait()
            call.cancel()  # as uvicorn does
            return await call

    response = run(cut_off())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert response.headers["retry-after"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (PATH, HELLO, "messages"),
        ("/v1/messages", {**HELLO, "max_tokens": 5}, None),
        ("/v1/responses", {"input": "a"}, "input"),
        ("/v1/completions", {"prompt": "a"}, "prompt"),
    ],
)
def test_a_prompt_beyond_the_context_has_a_code(
    client: Client, service: ScriptedService, path: str, body: dict[str, Any], param: str | None
) -> None:
    service.scripts = [Script(refusal=ContextLengthError("prompt: expected at most 9 tokens, got 10"))]
    response = client.post(path, body)
    assert response.status_code == 400
    error = response.json()["error"]
    if param is None:
        assert error["message"].startswith("messages: expected at most 9 tokens")
    else:
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert error["message"].startswith(param)


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        (PATH, HELLO, "response_format.json_schema.schema"),
        ("/v1/messages", {**HELLO, "max_tokens": 5}, "output_config.format.schema"),
        ("/v1/responses", {"input": "a"}, "text.format.schema"),
    ],
)
def test_a_schema_that_nothing_fits_has_the_name_of_its_place(
    client: Client, service: ScriptedService, path: str, body: dict[str, Any], place: str
) -> None:
    service.scripts = [Script(refusal=RequestError("schema: expected a grammar that some text fits"))]
    response = client.post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == f"{place}: expected a grammar that some text fits"


def test_a_slash_too_much_is_no_redirect(client: Client) -> None:
    assert client.post(f"{PATH}/", HELLO).status_code == 404


def test_a_bug_is_a_500_that_the_log_explains(
    client: Client, service: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    service.scripts = []  # so that the script's list is empty: an IndexError inside the service
    response = client.post(PATH, HELLO)
    assert response.status_code == 500
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    assert "IndexError" in caplog.text
    assert "IndexError" not in response.text


def test_a_bug_in_mid_stream_is_a_last_frame_that_the_log_explains(
    client: Client, service: ScriptedService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*arguments: Any) -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"
        raise IndexError("a secret of the server")

    monkeypatch.setattr(openai_chat, "chat_frames", broken)
    service.scripts = [Script()]
    response = client.post(PATH, {**HELLO, "stream": True})
    *_, last, rest = response.text.split("\n\n")
    assert (json.loads(last.removeprefix("data: "))["error"]["type"], rest) == ("server_error", "")
    assert "secret" not in response.text
    assert "IndexError" in caplog.text


def test_the_dashboard_asks_for_metrics_that_there_are(
    client: Client, service: ScriptedService, tokenizer: Any
) -> None:
    service.scripts = [
        Script(one_by_one(tokenizer, THOUGHT)),
        Script(refusal=QueueFullError("queue: full", retry_after_s=1, reason="queue")),
    ]
    for _ in range(2):
        client.post(PATH, HELLO)
    families = text_string_to_metric_families(client.get("/metrics").text)
    there = {sample.name for family in families for sample in family.samples}
    dashboard = json.loads((REPO / "docs" / "grafana.json").read_text())
    asked = {
        name for panel in dashboard["panels"] for target in panel["targets"] for name in NAME.findall(target["expr"])
    }
    assert len(dashboard["panels"]) > 5
    assert asked <= there

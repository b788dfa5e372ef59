"""The command `serve` as a process: where it listens, how it loads and how it ends."""

from __future__ import annotations

import io
import json
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from hybrid_k2.server.listen import REFUSED_AT_ONCE
from tests.cli.conftest import ONE_THREAD, Done
from tests.cli.conftest import call as call  # noqa: PLC0414  (a fixture)
from tests.generators import write_checkpoint
from tests.server.processes import START_S, serving
from tests.server.test_chat import PATH

LONG = {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True, "stream": True, "temperature": 0}
Call = Callable[..., Done]


def test_it_listens_before_the_model_is_there_and_drains(tmp_path: Path) -> None:
    with serving(tmp_path, "--log-format", "json", "--allowed-host", "gpu-box") as server:
        url = server.url
        for host, status in (("gpu-box:80", {200, 503}), ("localhost", {200, 503}), ("evil.example", {403})):
            assert httpx.get(f"{url}/health", headers={"host": host}, timeout=30).status_code in status
        states = {httpx.get(f"{url}/health", timeout=30).json()["status"]}
        server.wait_ready()
        assert states <= {"loading", "ok"}
        with httpx.stream("POST", url + PATH, json={**LONG, "max_tokens": 600}, timeout=120) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            server.said("draining")
            refused = httpx.post(url + PATH, json=LONG, timeout=30)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert "retry-after" in refused.headers
            *_, last = [line for line in lines if line]
        assert last == "data: [DONE]", "what ran may end"
        assert server.ended() == 0
        requests = [json.loads(line) for line in server.text().splitlines() if line.startswith("{")]
        assert any(line.get("finish_reason") == "length" and line["completion_tokens"] == 600 for line in requests)


def test_what_does_not_end_in_time_is_told_so(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-timeout", "0.2") as server:
        server.wait_ready()
        with httpx.stream("POST", server.url + PATH, json=LONG, timeout=120) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            *_, last = [line for line in lines if line]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert server.ended() == 0


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "k2.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with serving(tmp_path, "--uds", path) as server:
        server.said("ready after")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://k2") as client:
            assert client.get("/v1/models", timeout=30).status_code == 200
        assert path.stat().st_mode & 0o777 == 0o660
        server.process.send_signal(signal.SIGINT)
        assert server.ended() == 0
        assert not path.exists()


def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    files = ("--ssl-certfile", certificate, "--ssl-keyfile", key)
    with serving(tmp_path, *files, "--max-connections", "1") as server, ExitStack() as stack:
        assert server.url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{server.url}/health", verify=trusted, timeout=30).status_code in (200, 503)
        # Those that do not end their handshake are bounded, too.
        host, port = server.url.removeprefix("https://").split(":")
        silent = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(REFUSED_AT_ONCE + 2)]
        ended, _, _ = select.select(silent, [], [], START_S)
        refused = [one for one in ended if one in silent[-2:]]  # the connection of /health may still count, or not
        assert refused, "one of the last, before the time for the first one's handshake is over"
        assert refused[0].recv(1) == b""
    assert "Traceback" not in server.text()


def test_options_from_a_file_and_the_environment(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(
        "served-model-name: [from-file, second]\napi-key: file-key\nstrict-moonshot: true\nno-web: true\n"
        "max-images: 1\n"
    )
    keys = tmp_path / "keys"
    keys.write_text("# of the team\nanna-key\n\nben-key\n")
    variables = {"HYBRID_K2_CONFIG": str(config), "HYBRID_K2_API_KEY_FILE": str(keys), "HYBRID_K2_API_KEY": "env-key"}
    with serving(tmp_path, **variables) as server:
        server.wait_ready()
        for key, known in (("env-key", True), ("anna-key", True), ("ben-key", True), ("file-key", False)):
            response = httpx.get(f"{server.url}/v1/models", headers={"x-api-key": key}, timeout=30)
            assert (response.status_code == 200) is known, key
            if known:
                assert [model["id"] for model in response.json()["data"]] == ["from-file", "second"]
        body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
        refused = httpx.post(server.url + PATH, json=body, headers={"x-api-key": "env-key"}, timeout=30)
        assert "only 1 is allowed" in refused.json()["error"]["message"]
        parts = [{"type": "image_url", "image_url": "data:image/png;base64,"}] * 2
        body = {"messages": [{"role": "user", "content": parts}]}
        refused = httpx.post(server.url + PATH, json=body, headers={"x-api-key": "env-key"}, timeout=30)
        assert "expected at most 1 images in a request, got 2" in refused.json()["error"]["message"]
        assert httpx.get(server.url, headers={"x-api-key": "env-key"}, timeout=30).status_code == 404


def test_video_needs_its_packages(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    done = call("serve", "--video", "--port", "0")
    assert done.code == 1
    assert done.err.startswith("error: --video: expected PyAV 17.1 or newer and Pillow to read video with, got no av\n")
    assert "hint: pip install --upgrade av pillow" in done.err
    assert "listening" not in done.err


def test_a_model_that_does_not_load_ends_the_server(call: Call, tmp_path: Path) -> None:
    done = call("serve", tmp_path / "nothing", "--port", "0")
    assert done.code == 1
    assert done.err.count("error: ") == 1
    assert "nothing" in done.err


def test_without_its_packages_it_says_which(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hybrid_k2.server.process", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = call("serve", "--port", "0")
    assert done.code == 1
    assert "got no uvicorn" in done.err
    assert "hybrid-k2[serve]" in done.err


def test_grammars_are_prepared_before_requests_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    from hybrid_k2.cli.serve import _load
    from hybrid_k2.cli.terminal import Output
    from hybrid_k2.engine import Engine
    from hybrid_k2.engine.service_types import ServiceOptions

    served = _load("demo", ONE_THREAD[1], ServiceOptions(), Output(sys.stderr), lambda done, total: None)
    try:
        assert isinstance(served.model, Engine)
        assert "guide_vocabulary" in vars(served.model.loaded), "it is kept once it was made"
    finally:
        served.close()


def test_images_that_nothing_can_decode_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_k2.cli.serve import _load
    from hybrid_k2.cli.terminal import Output
    from hybrid_k2.engine.service_types import ServiceOptions

    def said(model_type: str) -> str:
        model = write_checkpoint(tmp_path / model_type, model_type=model_type, num_hidden_layers=2, vocab_size=1500)
        notes = io.StringIO()
        _load(str(model), ONE_THREAD[1], ServiceOptions(), Output(notes), lambda done, total: None).close()
        return notes.getvalue()

    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "warning: without Pillow, images in requests are refused: pip install pillow" in said("kimi_k25")
    assert "Pillow" not in said("kimi_k2")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--ssl-certfile", "x"], 1, "--ssl-keyfile"),
        (["--ssl-certfile", "x", "--ssl-keyfile", "y"], 1, "PEM"),
        (["--host", "no.such.host.invalid"], 1, "--host"),
        (["--host", "a..b"], 1, "--host"),
        (["--port", "70000"], 2, "--port"),
        (["--uds", "/no/such/folder/socket"], 1, "--uds"),
        (["--api-key-file", "/no/such/file"], 1, "/no/such/file"),
        (["--api-key", "two words"], 1, "API key 1"),
        (["--served-model-name", ""], 1, "model name"),
        (["--cache-ram", "much"], 2, "--cache-ram"),
        (["--cache-file", "prompts"], 2, "--cache-ram beside it"),
        (["--max-body", "0"], 2, "--max-body"),
        (["--max-bodies", "all"], 2, "--max-bodies"),
        (["--max-images", "-1"], 2, "--max-images"),
        (["--max-connections", "0"], 2, "--max-connections"),
        (["--max-connections", str(2**40)], 1, "--max-connections: expected at most"),
        (["--log-format", "xml"], 2, "--log-format"),
        (["--keep-alive", "nan"], 2, "86400"),
        (["--drain-timeout", "inf"], 2, "86400"),
        (["--config", "/no/such/file"], 1, "/no/such/file: expected a file of options, got no such file"),
    ],
)
def test_wrong_options(call: Call, arguments: list[str], code: int, words: str) -> None:
    done = call("serve", "--port", "0", *arguments)
    assert done.code == code, done.err
    assert words in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step-tokens", "100000"], "step_tokens: expected at most"),
        (["--cache-ram", "4096TiB"], "cache_ram_bytes: expected at most"),
        (["--cache-ram", "1MiB", "--cache-file", "/dev/null"], "/dev/null: expected a prefix cache file"),
        (["--cache-ram", "1MiB", "--cache-file", "/dev/null/x"], "/dev/null/x: expected a folder that can be made"),
    ],
)
def test_options_that_do_not_suit_the_plan_are_refused_before_weights_are_read(
    call: Call, arguments: list[str], words: str
) -> None:
    done = call("serve", "--port", "0", "--rules", ONE_THREAD[1], *arguments)
    assert done.code == 1
    assert words in done.err
    assert "kv cache: " in done.err
    assert "ready after" not in done.err


def test_a_file_that_holds_something_else_is_not_replaced_by_the_cache(call: Call, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.write_text("kept")
    done = call("serve", "--port", "0", "--rules", ONE_THREAD[1], "--cache-ram", "1MiB", "--cache-file", notes)
    assert done.code == 1
    assert f"{notes}: expected a prefix cache, an empty file or none, got a file that holds something else" in done.err
    assert notes.read_text() == "kept"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ports: 80\n", ":1: expected an option"),
        ("host: a\nport: [80]\n", ":2: port: expected one value"),
        ("port: 80\nport: 81\n", ":2: expected each key once"),
        ("- port\n", ":1: expected options"),
        ("config: other.yaml\n", ":1: expected an option"),
        ("", "empty"),
    ],
)
def test_wrong_config_files(call: Call, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    done = call("serve", "--config", file)
    assert done.code == 1
    assert f"{file}" in done.err
    assert words in done.err


def test_a_port_that_is_taken(call: Call) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = call("serve", "--port", str(taken.getsockname()[1]))
    assert done.code == 1
    assert "--port: expected a free port" in done.err


def test_a_body_that_never_comes_does_not_stop_others(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.wait_ready()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{{".encode())
            assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
        with socket.create_connection((host, int(port))) as flood:
            flood.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"y" * 200_000 + b"\r\n\r\n")
            assert b" 4" in flood.recv(200)[:12]
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200


def test_clients_that_leave_free_their_place(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.wait_ready()

        def running() -> float:
            text = httpx.get(f"{server.url}/metrics", timeout=30).text
            (line,) = [line for line in text.splitlines() if line.startswith("hybrid_k2_num_requests_running ")]
            return float(line.split()[1])

        def wait_for(number: float) -> None:
            deadline = time.monotonic() + 60
            while running() != number:
                assert time.monotonic() < deadline
                time.sleep(0.05)

        with httpx.stream("POST", server.url + PATH, json=LONG, timeout=120) as stream:
            lines = stream.iter_lines()  # to be kept: without it the client closes the stream
            next(lines)
            wait_for(1)
        wait_for(0)
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "stream": False})
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
            )
            wait_for(1)
        wait_for(0)
        server.said("status=499")

"""`chat --server` beside servers that refuse, lie, break off or are none: one clear error each."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Done, Pipes
from tests.cli.socket_server import CHAT, MODELS, as_json, delta, response, saying, stream
from tests.cli.terminal import Terminal

Call = Callable[..., Done]
PROMPT = r"> $"
HELLO = [delta(content="Hel"), delta(content="lo.")]
ENDLESS = [delta(content="Once upon "), delta(content="a time ")]
END = delta("stop") | {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def ask(call: Call, url: str, *more: str) -> Done:
    return call("chat", "--server", url, "-p", "hi", *more)


def one_error(done: Done) -> str:
    assert done.code == 1, done
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.err
    return line


def test_a_good_stream(call: Call) -> None:
    with saying({CHAT: stream(*HELLO, END)}) as server:
        done = ask(call, server.url)
        assert (done.code, done.out) == (0, "Hello.\n"), done.err
        assert "3 tokens · prefill 7" in done.err


BROKEN = {
    "cut off": (stream(*HELLO, end=b""), "broke in the middle"),
    "cut in a frame": (stream(*HELLO, end=b'data: {"choices": [{"delta": {"content": "x'), "broke in the middle"),
    "cut in a chunk": (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n40\r\ndata: {",
        "broke in the middle",
    ),
    "no chunk": (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        "broke in the middle",
    ),
    "the end without [DONE]": (stream(*HELLO, END, end=b""), "broke in the middle"),
    "no finish reason": (stream(*HELLO), "expected a finish reason"),
    "no JSON": (stream(end=b"data: {nonsense\n\n"), "expected a JSON object in the stream, got b'{nonsense'"),
    "a list": (stream([1]), "expected a JSON object"),
    "deep": (stream(end=b"data: " + b"[" * 100_000 + b"\n\n"), "expected a JSON object"),
    "content of a wrong type": (stream(delta(content=["x"])), "content: expected str or null"),
    "choices of a wrong type": (stream({"choices": ["x"]}), "choices: expected objects"),
    "an unknown end": (stream(delta("tired")), "finish_reason: expected stop, length, tool_calls, got 'tired'"),
    "arguments without a name": (
        stream(delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}])),
        "expected a name first",
    ),
    "a wrong count": (stream(END | {"usage": {"prompt_tokens": -1}}), "prompt_tokens: expected a count, got -1"),
    "an error": (stream(*HELLO, {"error": {"message": "the engine failed"}}, end=b""), "the engine failed"),
    "an error without words": (stream({"error": {}}, end=b""), "the reply failed"),
    "another content type": (stream(*HELLO, END, kind="text/html"), "got text/html as the answer"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", "got something else than HTTP"),
    "nothing": (b"", "cannot be reached: Remote end closed connection"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_reply_that_breaks_off(call: Call, case: str) -> None:
    answer, words = BROKEN[case]
    with saying({CHAT: answer}) as server:
        said = one_error(ask(call, server.url, "-q", "--json"))
    assert words in said
    assert server.url in said


REFUSALS = {
    "400": (as_json({"error": {"message": "temperature: too hot"}}, 400), "400: temperature: too hot", ""),
    "401": (as_json({"error": {"message": "API key: expected a known one"}}, 401), "API key: expected", "--api-key"),
    "404": (as_json({"error": {"message": "no such model"}}, 404), "404: no such model", ""),
    "404 without words": (response(404, b"<h1>nope</h1>", "text/html"), "expected a server of hybrid-k2", "serve"),
    "redirect": (response(307, b"", location="http://127.0.0.1:9/"), "got 307: it is somewhere else", ""),
    "429": (as_json({"error": {"message": "too many wait"}}, 429, retry_after="7"), "429: too many", "again in 7 s"),
    "429 with a date": (as_json({"error": "busy"}, 429, retry_after="Mon, 01 Jan"), "429: busy", ""),
    "500": (response(500, b""), "500: Internal Server Error", ""),
    "503": (as_json({"error": {"message": "draining"}}, 503, retry_after="5"), "503: draining", "again in 5 s"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_request_that_is_refused(call: Call, case: str) -> None:
    answer, words, hint = REFUSALS[case]
    with saying({CHAT: answer}) as server:
        done = ask(call, server.url)
    assert words in one_error(done)
    assert done.out == ""
    assert hint in done.err
    assert ("hint: " in done.err) == bool(hint)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (response(404, b"", "text/html"), "expected a server of hybrid-k2"),
        (as_json({"error": {"message": "API key: expected a known one"}}, 401), "API key: expected a known one"),
        (as_json([]), "got no list of models"),
        (as_json({"data": ["k2"]}), "got no list of models"),
        (as_json({"data": []}), "expected a model that it serves (none), got none"),
        (response(200, b"x" * 100, "text/html"), "got no list of models"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "got something else than HTTP"),
    ],
)
def test_what_is_no_server_of_ours(call: Call, models: bytes, words: str) -> None:
    with saying({"/v1/models": models}) as server:
        assert words in one_error(ask(call, server.url))


def test_a_model_that_is_not_served(call: Call) -> None:
    with saying({}) as server:
        done = call("chat", "other", "--server", server.url, "-p", "hi")
        assert "expected a model that it serves (k2), got other" in one_error(done)


def test_nobody_listens(call: Call, tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        done = ask(call, f"http://127.0.0.1:{port}")
    assert "cannot be reached: Connection refused" in one_error(done)
    assert "hint: does hybrid-k2 serve run there?" in done.err
    assert "cannot be reached: No such file" in one_error(ask(call, f"unix:{tmp_path}/none"))
    assert "cannot be reached: " in one_error(ask(call, "http://no.such.host.invalid"))
    assert "cannot be reached: " in one_error(ask(call, "http://a..b"))


def test_tls_to_a_server_without(call: Call) -> None:
    with saying({}) as server:
        assert "TLS fails" in one_error(ask(call, server.url.replace("http:", "https:")))


@pytest.mark.parametrize("state", ["draining", "failing"])
def test_a_server_that_takes_no_requests(call: Call, state: str) -> None:
    with saying({"/health": as_json({"status": state}, 503)}) as server:
        assert f"got one that is {state}" in one_error(ask(call, server.url))


def test_the_loading_is_waited_for_and_shown(call: Call) -> None:
    def loading(read: int) -> bytes:
        return as_json({"status": "loading", "progress": {"read_bytes": read, "total_bytes": 8 << 30}}, 503)

    early = as_json({"data": [{"id": "k2", "context_length": None}]})
    answers = {
        "/v1/models": [early, as_json(MODELS)],
        "/health": [loading(0), loading(1 << 30), as_json({"status": "ok"})],
        CHAT: stream(*HELLO, END),
    }
    with saying(answers) as server:
        done = ask(call, server.url)
    assert (done.code, done.out) == (0, "Hello.\n"), done.err
    assert done.err.startswith(f"{server.url}: the model is loading\nserver: {server.url}, model k2, 1000 tokens of")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rules", "host"], ["--rules", "--server"]),
        (["--dry-run"], ["--dry-run", "--server"]),
        (["--host-memory", "1GiB"], ["--host-memory", "--server"]),
        (["--trace", "t.json"], ["--trace", "--server"]),
        (["--api-key", "a", "--api-key-file", "b"], ["--api-key-file", "--api-key"]),
    ],
)
def test_options_that_mean_nothing_there(call: Call, arguments: list[str], words: list[str]) -> None:
    done = ask(call, "http://127.0.0.1:9", *arguments)
    assert done.code == 2
    assert all(word in done.err for word in words)


def test_a_key_needs_a_server(call: Call) -> None:
    done = call("chat", "-p", "hi", "--api-key", "secret")
    assert done.code == 2
    assert "--api-key" in done.err
    assert "--server" in done.err
    assert "secret" not in done.err


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000", "ftp://host", "http://", "http://h:x", "http://h:99999", "http://u:secret@h", "unix:",
        "http://h?key=1", "http://h/#x", "http://h/a b", "http://h/ü", "http://[::1", "",
    ],
)  # fmt: skip
def test_what_is_no_address(call: Call, url: str) -> None:
    done = ask(call, url)
    assert done.code == 2
    assert "--server" in done.err
    assert "secret" not in done.err


def test_a_broken_reply_loses_nothing_of_the_chat(environment: dict[str, str], tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    answers = {CHAT: [stream(*HELLO, END), stream(delta(content="half"), end=b""), stream(*HELLO, END)]}
    with saying(answers) as server, Terminal(["chat", "--server", server.url], environment) as user:
        user.wait_for(PROMPT)
        for message, words in (("first", "Hello"), ("second", "error: .*broke in the middle"), ("third", "Hello")):
            user.type(f"{message}\r")
            user.wait_for(words)
            user.wait_for(PROMPT)
        user.type(f"/save {saved}\r")
        assert "saved 4 messages" in user.wait_for(PROMPT)
        user.type("/exit\r")
        assert user.exit_code() == 0
    said = [message["content"] for message in json.loads(saved.read_text())["messages"]]
    assert said == ["first", "Hello.", "third", "Hello."]
    assert b"second" not in server.requests[-1]
    assert "[stopped]" not in user.plain


def test_ctrl_c_hangs_up(environment: dict[str, str], tmp_path: Path) -> None:
    saved = tmp_path / "stopped.json"
    with (
        saying({CHAT: stream(*ENDLESS, end=b"")}, hold=True) as server,
        Terminal(["chat", "--server", server.url], environment) as user,
    ):
        user.wait_for(PROMPT)
        user.type("talk\r")
        user.wait_for("Once")
        user.type("\x03")
        user.wait_for(r"\[stopped\]")
        user.wait_for(PROMPT)
        assert server.gone.wait(30)
        user.type(f"/save {saved}\r")
        user.wait_for(PROMPT)
        user.type("\x04")
        assert user.exit_code() == 0
    _, reply = json.loads(saved.read_text())["messages"]
    assert reply["stopped"] is True
    assert reply["content"].startswith("Once")


def test_ctrl_c_in_one_answer(start: Callable[..., Pipes]) -> None:
    with saying({CHAT: stream(*ENDLESS, end=b"")}, hold=True) as server:
        process = start("chat", "--server", server.url, "-q", "-p", "hi")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b""
        assert server.gone.wait(30)

"""`chat --server`: the same chat, with the model in a server process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import ONE_THREAD, Done
from tests.cli.terminal import Terminal
from tests.server.processes import ServerProcess, serving

Call = Callable[..., Done]
PROMPT = r"> $"
FIGURES = r"decode\s+[\d.]+\s+tok/s\n"
SEED = ["--seed", "5", "--max-tokens", "60"]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("server"), "--api-key", "the-key") as server:
        server.wait_ready()
        yield server


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_K2_API_KEY", "the-key")


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("think", ["--think", "--no-think"])
def test_the_answer_is_that_of_the_engine_here(call: Call, server: ServerProcess, think: str) -> None:
    ask = ["-q", "--json", "-p", "What is 17 + 25?", "--system", "Be kind.", think, *SEED]
    here = json.loads(call("chat", *ONE_THREAD, *ask).out)
    done = call("chat", "--server", server.url, *ask)
    assert done.code == 0, done.err
    there = json.loads(done.out)
    assert there["model"] == "demo"
    for name in ("text", "reasoning", "tool_calls", "finish_reason", "seed"):
        assert there[name] == here[name], name
    for name in ("prompt_tokens", "completion_tokens", "reasoning_tokens"):
        assert there["usage"][name] == here["usage"][name], name
    assert there.keys() == here.keys()
    assert there["timings"]["decode_tokens_per_s"] > 0


@pytest.mark.usefixtures("key")
def test_tool_calls_and_a_stop_text(call: Call, server: ServerProcess, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([ADD]))
    ask = ["-q", "--json", "-p", "Add 3 and 4 with the tool.", "--tools", str(tools), "--temperature", "0", *SEED]
    here, there = (json.loads(call("chat", *where, *ask).out) for where in (ONE_THREAD, ["--server", server.url]))
    for name in ("text", "reasoning", "tool_calls", "finish_reason"):
        assert there[name] == here[name], name

    done = call("chat", "--server", server.url, "-q", "--no-think", "--stop", "4", "-p", "What is 17 + 25?", *SEED)
    assert done.code == 0
    assert "4" not in done.out


def test_keys(call: Call, server: ServerProcess, tmp_path: Path) -> None:
    ask = ["chat", "--server", server.url + "/v1/", "-p", "hi", "--max-tokens", "3", "--no-think"]
    file = tmp_path / "keys"
    file.write_text("# mine\nthe-key\n")
    assert call(*ask, "--api-key-file", file).code == 0
    assert call(*ask, "--api-key", "the-key").code == 0
    for wrong in ([], ["--api-key", "another-key"]):
        done = call(*ask, *wrong)
        assert done.code == 1
        assert "API key: " in done.err
        assert "HYBRID_K2_API_KEY" in done.err
        assert "another-key" not in done.err
    done = call(*ask, "--api-key", "two words")
    assert done.code == 1
    assert "two words" not in done.err


@pytest.mark.usefixtures("key")
def test_a_pipe_is_the_prompt_and_notes_say_who_answers(call: Call, server: ServerProcess) -> None:
    done = call("chat", "--server", server.url, "--temperature", "0", "--max-tokens", "5", stdin=b"hello")
    assert done.code == 0
    assert f"server: {server.url}, model demo, " in done.err
    assert "5 tokens (5 thinking) · prefill " in done.err
    assert "the-key" not in done.err + done.out


def test_a_chat(server: ServerProcess, environment: dict[str, str], tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    variables = {"HYBRID_K2_API_KEY": "the-key"}
    arguments = ["chat", "--server", server.url, "--temperature", "0", "--max-tokens", "40"]
    with Terminal(arguments, environment | variables) as user:
        assert "model demo" in user.wait_for(PROMPT)
        user.type("What is 17 + 25?\r")
        assert "thinking" in user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type(f"/save {saved}\r")
        user.wait_for(PROMPT)
        first = json.loads(saved.read_text())
        assert first["model"] == "demo"
        user.type("/regen\r")
        user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type(f"/save {saved}\r")
        user.wait_for(PROMPT)
        assert json.loads(saved.read_text()) == first
        user.type("/think off\r")
        user.wait_for(PROMPT)
        user.type("Tell me a story.\r")
        assert "thinking" not in user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type("/stats\r")
        figures = user.wait_for(PROMPT)
        assert f"server            {server.url}" in figures
        assert "replies           3" in figures
        user.type("/exit\r")
        assert user.exit_code() == 0
    assert "the-key" not in user.text


def test_ctrl_c_ends_the_request_in_the_server(babbler: Path, environment: dict[str, str], tmp_path: Path) -> None:
    with serving(tmp_path, model=babbler) as server:
        server.wait_ready()
        with Terminal(["chat", "--server", server.url, "--temperature", "0"], environment) as user:
            user.wait_for(PROMPT)
            user.type("talk\r")
            user.wait_for("thinking\n.")
            user.type("\x03")
            user.wait_for(r"\[stopped\]")
            user.wait_for(PROMPT)
            server.said("status=499")
            user.type("\x04")
            assert user.exit_code() == 0


def test_a_unix_socket_and_tls(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "k2.sock"
    ask = ["-q", "-p", "What is 17 + 25?", "--no-think", *SEED]
    with serving(tmp_path, "--uds", path) as server:
        server.said("listening on")
        by_socket = call("chat", "--server", f"unix:{path}", *ask)  # it may still be loading: that is waited for
        assert by_socket.code == 0, by_socket.err

    certificate, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(private), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    with serving(tmp_path, "--ssl-certfile", certificate, "--ssl-keyfile", private) as server:
        url = server.url
        done = call("chat", "--server", url, *ask)
        assert done.code == 1
        assert "expected a certificate that is trusted here" in done.err
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert call("chat", "--server", url, *ask) == by_socket

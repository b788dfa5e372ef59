"""The built-in model at the command line: a right answer, and a tool that the user plays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_k2.demo import FOLDER
from tests.cli.conftest import ONE_THREAD, Done
from tests.cli.terminal import Terminal
from tests.cli.test_interactive import FIGURES, PROMPT

pytestmark = pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason="no demo checkpoint in this tree")

CLOCK = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the current time in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([CLOCK]))
    return path


def test_a_sum(call: Callable[..., Done]) -> None:
    done = call("chat", "-q", *ONE_THREAD, "--temperature", "0", "--prompt", "What is 17 + 25?")
    assert done.code == 0
    assert "42" in done.out
    assert done.err == ""


def test_a_tool_call_in_json(call: Callable[..., Done], tools: Path) -> None:
    done = call(
        "chat", "-q", *ONE_THREAD, "--temperature", "0", "--tools", tools, "--json", "-p", "What time is it in Oslo?"
    )
    reply = json.loads(done.out)
    assert reply["finish_reason"] == "tool_calls"
    (tool_call,) = reply["tool_calls"]
    assert tool_call["name"] == "get_time"
    assert json.loads(tool_call["arguments"]) == {"city": "Oslo"}


def test_the_user_is_the_tool(environment: dict[str, str], tools: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    with Terminal(["chat", "-q", *ONE_THREAD, "--temperature", "0", "--tools", str(tools)], environment) as user:
        user.wait_for(PROMPT)
        user.type("What time is it in Oslo?\r")
        assert 'get_time {"city": "Oslo"}' in user.wait_for(r"get_time> $")
        user.type('{"time": "09:41"}\r')
        assert "09:41" in user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type(f"/save {saved}\r")
        user.wait_for(PROMPT)
        user.type("/exit\r")
        assert user.exit_code() == 0
    roles = [message["role"] for message in json.loads(saved.read_text())["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]

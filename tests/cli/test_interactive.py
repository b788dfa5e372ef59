"""A whole chat at a pseudo-terminal, as a user has it."""

from __future__ import annotations

import json
import re
import stat
import time
from pathlib import Path

from tests.cli.conftest import ONE_THREAD
from tests.cli.terminal import ESCAPES, Terminal

PROMPT = r"> $"
FIGURES = r"decode\s+[\d.]+\s+tok/s\s+·\s+\d+\s+%\s+of\s+memory\s+limit\n"
LIKELIEST = ["--temperature", "0", "--no-think"]
SHORT = [*LIKELIEST, "--max-tokens", "30", *ONE_THREAD]


def test_a_chat(babbler: Path, environment: dict[str, str], tmp_path: Path) -> None:
    saved = tmp_path / "saved chat.json"
    with Terminal(["chat", str(babbler), "--system", "Be kind.", *SHORT], environment) as user:
        start = user.wait_for(PROMPT)
        assert start.index("rules: ") < start.index("routed_experts") < start.index("ready after")
        assert "/help lists the commands" in start

        user.type("/help\r")
        assert "/regen" in user.wait_for(PROMPT)
        user.type("/sav x\r")
        assert "error: /sav: no such command\nhint: did you mean /save?" in user.wait_for(PROMPT)
        user.type("/regen\r")
        assert "error: /regen: expected a message to answer" in user.wait_for(PROMPT)
        user.type("/load /no/such/file\r")
        assert "error: /no/such/file: cannot be read: No such file" in user.wait_for(PROMPT)

        user.type("first \\\rsecond\r")
        assert "30 tokens" in user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type(f"/save {saved}\r")
        assert f"saved 2 messages to {saved}" in user.wait_for(PROMPT)
        first = json.loads(saved.read_text())
        assert first["system"] == "Be kind."
        assert first["messages"][0] == {"role": "user", "content": "first \nsecond"}
        assert first["messages"][1]["content"]

        user.type("/regen\r")
        user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type(f"/save {saved}\r")
        user.wait_for(PROMPT)
        assert json.loads(saved.read_text()) == first, "temperature 0 says the same again, in place of the reply before"

        user.type("/clear\r")
        user.wait_for(PROMPT)
        user.type("/regen\r")
        assert "empty conversation" in user.wait_for(PROMPT)
        user.type(f"/save {saved}\r")
        user.wait_for(r"exists; replace it\? \[y/N\] ")
        user.type("n\r")
        assert "not saved" in user.wait_for(PROMPT)
        assert json.loads(saved.read_text()) == first
        user.type(f'/load "{saved}"\r')
        assert "loaded 2 messages" in user.wait_for(PROMPT)
        user.type("/think on\r")
        assert "thinking is on" in user.wait_for(PROMPT)
        user.type("/stats\r")
        assert re.search(r"replies +2\n", user.wait_for(PROMPT))
        user.type("/exit\r")
        assert user.exit_code() == 0
    history = Path(environment["XDG_STATE_HOME"]) / "hybrid-k2" / "history"
    assert "/stats" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert not re.search(r"[\x00-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f\x80-\x9f]", user.text)


def test_ctrl_c_stops_the_reply_and_not_the_chat(babbler: Path, environment: dict[str, str], tmp_path: Path) -> None:
    saved = tmp_path / "stopped.json"
    with Terminal(["chat", str(babbler), "-q", "--temperature", "0", *ONE_THREAD], environment) as user:
        user.wait_for(PROMPT)
        user.type("talk\r")
        user.wait_for("thinking\n.")
        user.type("\x03")
        user.wait_for(r"\[stopped\]\n.* tokens")
        user.wait_for(PROMPT)
        user.type(f"/save {saved}\r")
        user.wait_for(PROMPT)
        messages = json.loads(saved.read_text())["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert messages[1]["stopped"] is True
        assert messages[1]["reasoning_content"]

        user.type(f"/load {saved}\r")
        assert "loaded 2 messages" in user.wait_for(PROMPT)
        time.sleep(0.3)  # a signal just after the prompt, before readline listens, would wait for the next key
        user.type("not sent\x03")
        user.wait_for("Ctrl-D or /exit leaves")
        user.wait_for(PROMPT)
        user.type("\x03")
        user.wait_for("Ctrl-D or /exit leaves")
        user.wait_for(PROMPT)
        user.type("\x04")
        assert user.exit_code() == 0


def test_pasted_lines_are_one_message(babbler: Path, environment: dict[str, str], tmp_path: Path) -> None:
    saved = tmp_path / "pasted.json"
    with Terminal(["chat", str(babbler), "-q", *SHORT], environment) as user:
        user.wait_for(PROMPT)
        user.type("\x1b[200~  def f():\n\treturn 1\n\x1b[201~\r")
        user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type('"""\r/help\r\rlast\r"""\r')
        user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type(" /etc is a folder\r")
        user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type(f"/save {saved}\r")
        user.wait_for(PROMPT)
        user.type("\x04")
        assert user.exit_code() == 0
    texts = [m["content"] for m in json.loads(saved.read_text())["messages"] if m["role"] == "user"]
    assert texts == ["  def f():\n\treturn 1", "/help\n\nlast", "/etc is a folder"]


def test_a_message_that_does_not_fit_leaves_the_conversation_as_it_was(
    babbler: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    rules = tmp_path / "small.yaml"
    rules.write_text(Path(ONE_THREAD[1]).read_text() + "kv_cache: {tokens: 192}\n")
    with Terminal(
        ["chat", str(babbler), "--rules", str(rules), "-q", *LIKELIEST, "--max-tokens", "30"], environment
    ) as user:
        user.wait_for(PROMPT)
        user.type("hello\r")
        user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type("word " * 100 + "\r")
        assert "192" in user.wait_for(PROMPT).split("error: ")[1]
        user.type(f"/save {tmp_path / 'c.json'}\r")
        assert "saved 2 messages" in user.wait_for(PROMPT)
        user.type("again\r")
        user.wait_for(FIGURES)


def test_no_color(babbler: Path, environment: dict[str, str]) -> None:
    """And a history that cannot be kept is no reason to fail."""
    variables = {"NO_COLOR": "1", "XDG_STATE_HOME": "/dev/null/state"}
    with Terminal(["chat", str(babbler), *SHORT], environment | variables) as user:
        assert "the history is not kept: /dev/null/state" in user.wait_for(PROMPT)
        user.type("hello\r")
        user.wait_for(FIGURES)
        user.wait_for(PROMPT)
        user.type("/exit\r")
        assert user.exit_code() == 0
    # readline switches the terminal's handling of pastes; nothing else may be sent
    assert not ESCAPES.search(user.text.replace("\x1b[?2004h", "").replace("\x1b[?2004l", ""))

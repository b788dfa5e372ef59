"""What goes wrong in a chat: one error, and it goes on; a bug ends it, and the conversation is saved."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid_k2.cli.chat.backend import LocalBackend
from hybrid_k2.cli.chat.conversation import FORMAT, Conversation, load_conversation
from hybrid_k2.cli.chat.line_input import LineInput
from hybrid_k2.cli.chat.options import ChatOptions
from hybrid_k2.cli.chat.session import ChatSession
from hybrid_k2.cli.terminal import Output
from hybrid_k2.engine import SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
Chat = Callable[..., str]


class Broken:
    """An engine with a bug."""

    def generate(self, **_: Any) -> None:
        raise ZeroDivisionError("boom")


@pytest.fixture
def notes() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: io.StringIO) -> Chat:
    """Type lines into a chat in a folder that holds `good.json`; return what was noted."""
    data = {"format": FORMAT, "system": "Be kind.", "thinking": True, "messages": MESSAGES}
    (tmp_path / "good.json").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def type_lines(*lines: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        output = Output(notes)
        engine: Any = Broken()
        ChatSession(
            LocalBackend(engine, "demo"), ChatOptions(SamplingParams()), output, output, LineInput(output)
        ).run()
        return notes.getvalue()

    return type_lines


def prepare(folder: Path) -> None:
    """Put there what a path can lead to."""
    (folder / "digits.json").write_text('{"format": ' + "7" * 5000 + "}")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "loop").symlink_to("loop")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")


@pytest.mark.parametrize(
    "name", ["digits.json", "deep.json", "loop", "n" * 300, "pipe", "/dev/zero", ".", '""', "none"]
)
def test_loading_what_is_no_conversation(chat: Chat, tmp_path: Path, name: str) -> None:
    prepare(tmp_path)
    said = chat("/load good.json", f"/load {name}", "/save after.json")
    assert said.count("error: ") == 1
    assert json.loads((tmp_path / "after.json").read_text())["messages"] == MESSAGES


@pytest.mark.parametrize(
    "name", ["loop", "n" * 300, "folder", "pipe", "/dev/null", ".", '""', "none/c.json", "/proc/c"]
)
def test_saving_where_it_cannot_be(chat: Chat, tmp_path: Path, name: str) -> None:
    prepare(tmp_path)
    before = sorted(tmp_path.iterdir())
    said = chat("/load good.json", f"/save {name}", "/save after.json")
    assert said.count("error: ") == 1
    assert "replace it?" not in said
    assert json.loads((tmp_path / "after.json").read_text())["messages"] == MESSAGES
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "after.json"])


def test_a_bug_ends_the_chat_but_not_the_conversation(chat: Chat, notes: io.StringIO, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        chat("/load good.json", "hello")
    (rescued,) = (tmp_path / "state" / "hybrid-k2").glob("rescued-*.json")
    assert f"/load {rescued}\n" in notes.getvalue()
    assert stat.S_IMODE(rescued.stat().st_mode) == 0o600
    assert load_conversation(rescued) == (Conversation("Be kind.", MESSAGES), True)


def test_a_bug_in_a_command_rescues_as_well(chat: Chat, notes: io.StringIO, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    with pytest.raises(AttributeError):  # the broken engine has no plan to show
        chat("/load good.json", "/stats")
    assert re.search("the conversation cannot be saved: .*state", notes.getvalue())


def test_nothing_is_rescued_of_an_empty_chat(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        chat("hello")
    assert not (tmp_path / "state").exists()

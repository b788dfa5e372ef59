"""Commands on bad files: one error, and the chat goes on."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid_k2.cli.chat.conversation import FORMAT
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
        ChatSession(engine, ChatOptions("demo", SamplingParams()), output, output, LineInput(output)).run()
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

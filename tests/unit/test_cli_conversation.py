"""Conversations survive saving and loading; a file that is not one is refused with the place in it."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.cli.chat.conversation import FORMAT, Conversation, load_conversation, save_conversation
from hybrid_k2.errors import ConfigError, RequestError

TEXT = st.text(st.characters(codec="utf-8"))
CALL = st.builds(
    lambda name, arguments: {
        "id": "functions.f:0",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    TEXT,
    TEXT,
)
MESSAGES = st.lists(
    st.one_of(
        st.builds(lambda c: {"role": "user", "content": c}, TEXT),
        st.builds(lambda c, r, s: {"role": "assistant", "content": c, "reasoning_content": r, "stopped": s}, TEXT, TEXT,
                  st.booleans()),
        st.builds(lambda c, calls: {"role": "assistant", "content": c, "tool_calls": calls}, TEXT, st.lists(CALL)),
        st.builds(lambda c: {"role": "tool", "tool_call_id": "functions.f:0", "content": c}, TEXT),
    )
)  # fmt: skip


@given(MESSAGES, st.none() | TEXT, st.booleans())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, messages: list[Any], system: str | None, thinking: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "conversation.json"
    saved = Conversation(system, messages)
    save_conversation(path, saved, model="demo", thinking=thinking)
    assert load_conversation(path) == (saved, thinking)


def test_the_file_is_private_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("old")
    save_conversation(path, Conversation(), model="demo", thinking=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["format"] == FORMAT
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    save_conversation(tmp_path / "link.json", Conversation("s"), model="demo", thinking=True)
    assert (tmp_path / "link.json").is_symlink()
    assert load_conversation(tmp_path / "real.json")[0].system == "s"


@pytest.mark.parametrize(
    ("place", "message"), [("missing/c.json", "cannot be written: No such"), ("folder", "got a folder")]
)
def test_saving_where_it_cannot_be(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=message):
        save_conversation(tmp_path / place, Conversation(), model="demo", thinking=True)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


GOOD: dict[str, Any] = {"format": FORMAT, "system": None, "thinking": True, "messages": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a conversation saved by /save"),
        ('["\\ud800"]', "got the lone surrogate '.ud800'"),
        (json.dumps(GOOD | {"format": "other"}), "expected a conversation saved by /save"),
        (json.dumps(GOOD | {"system": 3}), "system: expected a string or null, got 3"),
        (json.dumps(GOOD | {"thinking": "yes"}), "thinking: expected true or false"),
        (json.dumps(GOOD | {"messages": {}}), "messages: expected a list"),
        (json.dumps(GOOD | {"messages": ["hi"]}), r"messages\[0\]: expected an object"),
        (json.dumps(GOOD | {"messages": [{"role": "system", "content": ""}]}), r"messages\[0\].role: expected user"),
        (json.dumps(GOOD | {"messages": [{"role": ["user"], "content": ""}]}), r"messages\[0\].role: expected user"),
        (json.dumps(GOOD | {"messages": [{"role": "user"}]}), r"messages\[0\].content: missing"),
        (json.dumps(GOOD | {"messages": [{"role": "user", "content": [1]}]}), r"messages\[0\].content: expected a str"),
        (
            json.dumps(GOOD | {"messages": [{"role": "user", "content": "", "x": 1}]}),
            r"messages\[0\].x: expected no such",
        ),
        (
            json.dumps(GOOD | {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}]}),
            r"messages\[0\].tool_calls\[0\]: expected id and function",
        ),
    ],
)
def test_a_file_that_is_no_conversation(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_conversation(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_conversation(tmp_path / "none.json")
    (tmp_path / "latin1").write_bytes(b'"caf\xe9"')
    with pytest.raises(ConfigError, match="expected UTF-8 text, got byte 0xe9"):
        load_conversation(tmp_path / "latin1")


def test_the_model_does_not_see_the_mark_of_a_stopped_reply() -> None:
    reply = {"role": "assistant", "content": "Once", "stopped": True}
    conversation = Conversation("Be brief.", [{"role": "user", "content": "story"}, reply])
    assert conversation.prompt() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "story"},
        {"role": "assistant", "content": "Once"},
    ]
    assert conversation.messages[1]["stopped"] is True


def test_what_is_answered_again() -> None:
    user, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    result = {"role": "tool", "tool_call_id": "functions.f:0", "content": "1"}
    assert Conversation(None, [user, reply]).before_last_reply() == [user]
    assert Conversation(None, [user, reply, result, reply]).before_last_reply() == [user, reply, result]
    assert Conversation(None, [user]).before_last_reply() == [user]
    with pytest.raises(RequestError, match="empty conversation"):
        Conversation().before_last_reply()

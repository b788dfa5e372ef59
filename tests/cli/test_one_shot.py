"""One answer from a prompt or a pipe: stdout is data, stderr the rest, the exit code says how it went."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import ONE_THREAD, Done, Pipes

Call = Callable[..., Done]
Start = Callable[..., Pipes]
FIXED = [*ONE_THREAD, "--temperature", "0", "--max-tokens", "24", "--no-think"]
ENDLESS = [*ONE_THREAD, "-p", "hello", "--temperature", "0", "--no-think"]


def test_the_help_is_clean_and_waits_for_no_large_package(command: Call) -> None:
    done = command("--help")
    assert done.code == 0
    assert done.err == ""
    assert "chat" in done.out
    told = command("--help", PYTHONPROFILEIMPORTTIME="1").err
    imported = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    assert "hybrid_k2.cli" in imported
    assert not imported & {"torch", "numpy", "numba", "tiktoken", "huggingface_hub", "fastapi"}


def test_the_version(call: Call) -> None:
    from hybrid_k2 import __version__

    assert call("--version") == Done(0, f"hybrid-k2 {__version__}\n", "")


def test_a_fresh_process_answers_and_says_what_it_does(command: Call, babbler: Path) -> None:
    done = command("chat", babbler, "--prompt", "hello", *FIXED)
    assert done.code == 0, done.err
    assert done.out.endswith("\n")
    assert done.out.strip()
    assert "\x1b[" not in done.err, "no styles without a terminal"
    rules, *rest = done.err.splitlines()
    assert rules.startswith("rules: ")
    assert any("routed_experts" in line for line in rest)
    assert any(line.startswith("ready after") and "experts: " in line for line in rest)
    assert re.fullmatch(
        r"24 tokens · prefill \d+ at [\d.]+ tok/s · decode [\d.]+ tok/s · \d+ % of memory limit", rest[-1]
    )


def test_json_is_one_object_with_the_same_text(call: Call, babbler: Path) -> None:
    plain = call("chat", babbler, "-q", *FIXED, stdin=b"hello")
    done = call("chat", babbler, "-q", "--json", *FIXED, "--seed", "7", stdin=b"hello")
    assert done.code == 0
    assert done.err == ""
    (line,) = done.out.splitlines()
    reply = json.loads(line)
    assert reply["text"].rstrip("\n") == plain.out.rstrip("\n")
    assert reply["model"] == str(babbler)
    assert reply["finish_reason"] == "length"
    assert reply["seed"] == 7
    assert reply["tool_calls"] == []
    assert reply["usage"]["completion_tokens"] == len(reply["token_ids"]) == 24
    assert reply["timings"]["decode_tokens_per_s"] > 0


def test_json_fields_are_documented(call: Call, babbler: Path) -> None:
    from tests.conftest import REPO

    reply = json.loads(call("chat", babbler, "-q", "--json", *FIXED, stdin=b"hello").out)
    doc = (REPO / "docs" / "chat.md").read_text(encoding="utf-8")
    for name in [*reply, *reply["usage"], *reply["timings"]]:
        assert f"`{name}`" in doc, name


def test_the_thinking_stays_off_stdout(call: Call, babbler: Path) -> None:
    done = call("chat", babbler, "-p", "hello", *ONE_THREAD, "--temperature", "0", "--max-tokens", "10")
    assert done.code == 0
    assert done.out == ""
    assert "[thinking]\n" in done.err
    assert "10 tokens (10 thinking)" in done.err


def test_texts_are_joined_and_a_dash_is_stdin(call: Call, babbler: Path) -> None:
    joined = call("chat", babbler, "-q", *FIXED, "-p", "say:\n\none\ntwo")
    assert joined.code == 0
    assert call("chat", babbler, "-q", *FIXED, "-p", "say:", "-p", "-", stdin=b"one\ntwo\n") == joined
    assert call("chat", babbler, "-q", *FIXED, stdin=b"\xef\xbb\xbfsay:\n\none\ntwo") == joined


def test_stdin_is_left_alone_unless_asked_for(start: Start, babbler: Path) -> None:
    """A pipe that nobody closes must not make the chat wait, and nothing is taken from it."""
    process = start("chat", babbler, "-p", "hello", *FIXED)
    os.write(process.stdin.fileno(), b"for another program\n")
    assert process.wait(60) == 0
    assert b"standard input is not read; --prompt -" in process.stderr.read()


def test_json_needs_a_prompt(environment: dict[str, str]) -> None:
    from tests.cli.terminal import Terminal

    with Terminal(["chat", "--json"], environment) as terminal:
        terminal.wait_for("expected --prompt")
        assert terminal.exit_code() == 2


def test_a_reader_that_leaves_ends_it_quietly(start: Start, babbler: Path) -> None:
    process = start("chat", babbler, "-q", *ENDLESS)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""


def test_ctrl_c(start: Start, babbler: Path) -> None:
    process = start("chat", babbler, "-q", *ENDLESS)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr.read() == b""


def test_a_bug_says_that_it_is_one(call: Call, babbler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_k2.engine import Engine

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(Engine, "generate", broken)
    done = call("chat", babbler, "-q", *ONE_THREAD, "-p", "hello")
    assert done.code == 70
    assert "ZeroDivisionError: boom" in done.err
    assert "please report it" in done.err.splitlines()[-1]


def test_a_wrong_log_level_is_an_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_K2_LOG", "loud")
    done = call("chat", "-p", "hello")
    assert done.code == 1
    assert "error: HYBRID_K2_LOG: expected one of debug, info, warning, error, got 'loud'" in done.err

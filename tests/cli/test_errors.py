"""What can be wrong gives one clear error, exit code 1, and nothing on stdout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import ONE_THREAD, Done

Call = Callable[..., Done]
GOOD_RULES = Path(ONE_THREAD[1]).read_text()


@pytest.fixture
def copy(babbler: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(babbler, tmp_path / "copy"))


def refused(done: Done, *expected: str) -> None:
    """Check that a command ended with one error that says all of `expected`."""
    assert done.code == 1, done
    assert done.out == ""
    assert len(re.findall(r"^error: ", done.err, re.MULTILINE)) == 1, done.err
    assert "Traceback" not in done.err
    error = done.err[done.err.index("error: ") :]
    assert len(error.splitlines()) <= 6, "an error is short"
    for text in expected:
        assert text in error


def test_no_such_folder(call: Call) -> None:
    refused(call("chat", "/no/such/folder", "-p", "hi"), "/no/such/folder", "hint: ")


def test_an_installation_without_the_demo_model(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hybrid_k2.demo.FOLDER", tmp_path / "none")
    refused(call("chat", "-p", "hi"), "an installation without it", "hint: install hybrid-k2 again")


def test_an_empty_folder(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(call("chat", tmp_path / "empty", "-p", "hi"), str(tmp_path / "empty"), "empty")


def test_a_truncated_shard(call: Call, copy: Path) -> None:
    shard = copy / "model.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)
    refused(call("chat", copy, "-p", "hi"), "model.safetensors")


def test_a_missing_shard(call: Call, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(call("chat", copy, "-p", "hi"), str(copy))


def test_a_config_of_another_model(call: Call, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    refused(call("chat", copy, "-p", "hi"), "model_type", "llama")


def test_a_rule_file_with_a_typo(call: Call, babbler: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(GOOD_RULES.replace("what: dense_mlp", "what: dense_mpl"))
    refused(call("chat", babbler, "--rules", rules, "-p", "hi"), f"{rules}:7", "dense_mpl")


def test_a_rule_that_matches_nothing(call: Call, babbler: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(GOOD_RULES.replace("what: shared_experts,", "what: shared_experts, layers: 40..50,"))
    refused(call("chat", babbler, "--rules", rules, "-p", "hi"), f"{rules}:8", "shared_experts")


def test_a_plan_over_the_memory_at_hand(call: Call, babbler: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(GOOD_RULES.replace("threads: 1", "memory: 100KiB"))
    refused(call("chat", babbler, "--rules", rules, "-p", "hi"), "host", "100.00 KiB")


def test_no_such_rules(call: Call, babbler: Path) -> None:
    refused(call("chat", babbler, "--rules", "hots", "-p", "hi"), "hots", "rules/host.yaml")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("--temperature", "-1", "temperature"), ("--top-p", "1.5", "top_p"), ("--max-tokens", "0", "max_tokens")],
)
def test_sampling_out_of_range_is_found_before_loading(call: Call, option: str, value: str, expected: str) -> None:
    refused(call("chat", "/no/such/folder", option, value, "-p", "hi"), expected, value)


DEEP_TOOL = '[{"type": "function", "function": {"name": "f", "parameters": ' + '{"a": ' * 200 + "1" + "}" * 200 + "}}]"


@pytest.mark.parametrize("content", ["{}", "[]", "[1]", '[{"type": "function"}]', DEEP_TOOL, "nonsense"])
def test_a_tools_file_that_is_none(call: Call, tmp_path: Path, content: str) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(content)
    refused(call("chat", "/no/such/folder", "--tools", tools, "-p", "hi"), str(tools))


def test_an_empty_prompt(call: Call) -> None:
    refused(call("chat", "-p", "  "), "--prompt", "got none")
    refused(call("chat", stdin=b"\n"), "standard input", "got none")


def test_a_prompt_with_two_places_for_stdin(call: Call) -> None:
    refused(call("chat", "-p", "-", "-p", "-", stdin=b"text"), "--prompt: expected - once, got it 2 times")


def test_input_that_is_not_utf8(call: Call) -> None:
    refused(call("chat", stdin=b"caf\xe9!"), "standard input", "0xe9", "offset 3")


def test_a_prompt_over_the_context_names_both_sizes(call: Call, babbler: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(GOOD_RULES + "kv_cache: {tokens: 128}\n")
    refused(call("chat", babbler, "--rules", rules, stdin=b"word " * 400), "128")


def test_wrong_usage(call: Call) -> None:
    for arguments in (["--no-such-option"], ["--temperature", "warm"], ["a", "b"]):
        done = call("chat", *arguments)
        assert done.code == 2
        assert done.out == ""


@pytest.mark.parametrize("command", [("chat", "-p", "hi"), ("bench", "overlap")])
def test_a_trace_without_a_name(call: Call, command: tuple[str, ...]) -> None:
    done = call(*command, "--trace", "")
    assert (done.code, done.out) == (2, "")
    assert "--trace: expected the name of a file, got" in " ".join(done.err.split())


def test_a_trace_replaces_no_other_file(call: Call, babbler: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    refused(call("chat", babbler, "-p", "hi", "--trace", notes), str(notes), "expected a trace", "hint: ")
    assert notes.read_text() == "mine"


@pytest.mark.parametrize("rules", ["", " "])
def test_rules_without_a_name(call: Call, rules: str) -> None:
    done = call("chat", "-p", "hi", "--rules", rules)
    assert done.code == 2
    assert done.out == ""
    assert "--rules: expected a rule file or a name, got" in " ".join(done.err.split())


def test_control_characters_in_an_error_are_harmless_on_a_terminal(copy: Path, environment: dict[str, str]) -> None:
    from tests.cli.terminal import Terminal

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "\x1b[2Jllama"}))
    with Terminal(["chat", str(copy)], environment | {"NO_COLOR": "1"}) as terminal:
        terminal.wait_for("error: ")
        assert terminal.exit_code() == 1
        assert "\x1b" not in terminal.text
        assert "llama" in terminal.text

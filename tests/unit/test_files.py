"""Reading a checkpoint's small files: what is no file is refused unopened, what is no plain JSON by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import CheckpointError, ConfigError, HybridK2Error
from hybrid_k2.files import MAX_DIGITS, parse_json_object, read_file
from hybrid_k2.protocol import Tokenizer
from tests.generators import write_checkpoint

OTHER_THINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (lambda path: path.mkdir(), "expected a file, got a folder"),
    "pipe": (os.mkfifo, "expected a file, got a device, pipe or socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "expected a file, got a device, pipe or socket"),
    "link to nothing": (
        lambda path: path.symlink_to("nowhere"),
        "expected a file, got a link to a file that does not exist",
    ),
    "link to itself": (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": ModelConfig.load,
    "generation_config.json": ModelConfig.load,
    "tiktoken.model": Tokenizer.load,
    "tokenizer_config.json": Tokenizer.load,
    "model.safetensors.index.json": Checkpoint.open,
}


@pytest.mark.parametrize("thing", OTHER_THINGS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path, name: str, thing: str) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=1, shards=2)
    path = tmp_path / name
    path.unlink()
    make, message = OTHER_THINGS[thing]
    make(path)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        READERS[name](tmp_path)
    assert caught.value.message == f"{path}: {message}"


def test_a_file_is_read_whole_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "some"
    path.write_bytes(bytes(range(100)))
    assert read_file(path, ConfigError, 100) == bytes(range(100))
    with pytest.raises(ConfigError, match="some: expected at most 99 bytes, got 100"):
        read_file(path, ConfigError, 99)
    with pytest.raises(CheckpointError, match="none: expected a file, got no such file"):
        read_file(tmp_path / "none", CheckpointError)


def test_json_is_read_as_it_is_written() -> None:
    text = '\ufeff{"a": [1, -2.5, true, null], "é": {"a": ' + "9" * MAX_DIGITS + "}}"
    assert parse_json_object(text.encode(), "x", ConfigError) == {
        "a": [1, -2.5, True, None],
        "é": {"a": 10**MAX_DIGITS - 1},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "x: expected valid JSON, got: Expecting value: line 1"),
        (b'{"a":\n}', "x: expected valid JSON, got: Expecting value: line 2"),
        (b'{"a": "\xff"}', "x: expected valid JSON, got: 'utf-8' codec"),
        (b"[" * 200_000, "x: expected valid JSON, got: "),
        (b'{"b": [{"a": 1, "c": 2, "a": 1}]}', "x: expected valid JSON, got: key 'a' twice"),
        (b'{"a": ' + b"9" * (MAX_DIGITS + 1) + b"}", "x: expected valid JSON, got: an integer of 1001 digits"),
        (b"[1]", "x: expected a JSON object, got list"),
    ],
)
@pytest.mark.parametrize("error_class", [CheckpointError, ConfigError])
def test_json_that_is_refused(text: bytes, message: str, error_class: type[HybridK2Error]) -> None:
    with pytest.raises(error_class) as caught:
        parse_json_object(text, "x", error_class)
    assert caught.value.message.startswith(message)

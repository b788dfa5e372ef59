"""The header of one safetensors file: damage is told from truth, with the file and the tensor named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from hybrid_k2.checkpoint.shard import MAX_HEADER_BYTES, TensorInfo, read_shard_header
from hybrid_k2.errors import CheckpointError


def read(path: Path) -> dict[str, TensorInfo]:
    with open(path, "rb", buffering=0) as file:
        return read_shard_header(path, file, path.stat().st_size)


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(()), "empty": torch.zeros(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    infos = read(path)
    assert infos.keys() == tensors.keys()
    assert {info.name: (info.dtype, info.shape, info.nbytes) for info in infos.values()} == {
        "a": ("BF16", (3, 5), 30),
        "b": ("F32", (), 4),
        "empty": ("F32", (0, 4), 0),
    }
    assert max(info.offset + info.nbytes for info in infos.values()) == path.stat().st_size


def test_a_header_of_gaps_and_metadata(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "x": entry(offsets=(16, 24)), "y": entry(offsets=(0, 8))}
    infos = read(write_raw(tmp_path / "m.safetensors", header, bytes(24)))
    assert infos["x"].offset - infos["y"].offset == 16


DAMAGED = {
    "not json": (b"{'a': 1}", 0, "safetensors header: expected valid JSON"),
    "not utf-8": (b"\xff\xff", 0, "safetensors header: expected valid JSON"),
    "a list": ([], 0, "expected a JSON object, got list"),
    "deep": (b"[" * 200_000, 0, "expected valid JSON"),
    "twice": (b'{"a": 1, "a": 1}', 0, "key 'a' twice"),
    "entry": ({"t": 3}, 0, "t: expected an object in the header, got 3"),
    "unknown dtype": ({"t": entry(dtype="F3")}, 8, "t: expected a known dtype, got 'F3'"),
    "no dtype": ({"t": {"shape": [2], "data_offsets": [0, 8]}}, 8, "t: expected a known dtype, got None"),
    "list dtype": ({"t": entry(dtype=["F32"])}, 8, "t: expected a known dtype"),
    "negative shape": ({"t": entry(shape=[-2])}, 8, "t: expected a shape of non-negative integers"),
    "float shape": ({"t": entry(shape=[2.0])}, 8, "t: expected a shape"),
    "bool shape": ({"t": entry(shape=[True])}, 8, "t: expected a shape"),
    "no shape": ({"t": entry(shape=None)}, 8, "t: expected a shape"),
    "one offset": ({"t": entry(offsets=[8])}, 8, "t: expected data_offsets"),
    "backwards": ({"t": entry(offsets=[8, 0])}, 8, "t: expected data_offsets"),
    "text offsets": ({"t": entry(offsets=["0", "8"])}, 8, "t: expected data_offsets"),
    "wrong size": ({"t": entry(shape=[3])}, 8, r"t: expected 12 bytes for F32 \[3\], got data_offsets of 8"),
    "huge shape": ({"t": entry(shape=[2**40, 2**40])}, 8, "t: expected .* bytes for F32"),
    "shape of more digits than Python shows": ({"t": entry(shape=[2**62] * 400)}, 8, "t: expected a value too large"),
    "overlap": (
        {"a": entry(), "b": entry(offsets=[4, 12])},
        12,
        "b: expected bytes of its own, got an overlap with a",
    ),
    "same bytes": ({"a": entry(), "b": entry()}, 8, "expected bytes of its own"),
    "beyond the end": (
        {"a": entry(), "b": entry(offsets=[8, 16])},
        15,
        "b: truncated: expected a file of at least",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    header, size, message = DAMAGED[case]
    path = write_raw(tmp_path / "model-00002-of-00004.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=message) as error:
        read(path)
    assert str(path) in error.value.message


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_an_impossible_header_length(tmp_path: Path, length: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"header of at most .* got a length of {length}") as error:
        read(path)
    assert error.value.hint == "download the file again"


def test_a_header_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes((4).to_bytes(8, "little") + b"{\xff:}")
    with pytest.raises(CheckpointError, match="safetensors header: expected valid JSON") as error:
        read(path)
    assert error.value.hint == "download the file again"


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9000\n")
    with pytest.raises(CheckpointError, match="got a Git LFS pointer") as error:
        read(path)
    assert error.value.hint is not None
    assert "git lfs pull" in error.value.hint


def test_every_cut_is_found(tmp_path: Path) -> None:
    """A file cut anywhere is truncated, and past the header the first tensor that suffers is named."""
    whole = save({"first": torch.ones(3), "second": torch.ones(5, dtype=torch.int64)})
    data_start = 8 + int.from_bytes(whole[:8], "little")
    ends = {info.name: info.offset + info.nbytes for info in read(write_whole(tmp_path, whole)).values()}
    for size in range(len(whole)):
        with pytest.raises(CheckpointError, match="truncated") as error:
            read(write_whole(tmp_path, whole[:size]))
        if size >= data_start:
            affected = min((end, name) for name, end in ends.items() if end > size)[1]
            assert error.value.message.startswith(f"{affected}: truncated")
            assert f"expected a file of at least {len(whole)} bytes, got {size}" in error.value.message


def write_whole(folder: Path, data: bytes) -> Path:
    path = folder / "m.safetensors"
    path.write_bytes(data)
    return path


@settings(max_examples=300)
@given(data=st.data())
def test_random_damage_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(save({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = write_whole(tmp_path_factory.mktemp("damaged"), bytes(whole))
    try:
        infos = read(path)
    except CheckpointError:
        return
    assert all(info.offset + info.nbytes <= len(whole) for info in infos.values())

"""The checkpoint folder: index, shards, and reading tensors while many threads do."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.errors import CheckpointError
from tests.generators import dequantized, read_tensors, write_checkpoint, write_tensors

INDEX = "model.safetensors.index.json"
DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.uint16),
    *(torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.int64, torch.uint64),
    torch.float64,
]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("single"), seed=1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sharded"), seed=2, shards=4)


@pytest.fixture
def broken(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded checkpoint, to be damaged."""
    return shutil.copytree(sharded, tmp_path / "copy")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    return str(error.value)


# Reading.


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_tensor_reads_as_the_library_reads_it(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    expected = read_tensors(folder)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.infos.keys() == expected.keys()
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in expected.values())
        for name, tensor in expected.items():
            got = checkpoint.read(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got, tensor)


def test_every_dtype_and_odd_shapes(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        for i, shape in enumerate([(), (0,), (0, 5), (1,), (3, 1, 7)]):
            raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=source)
            raw = raw % 2 if dtype == torch.bool else raw
            tensors[f"{dtype}.{i}"] = raw.view(dtype).reshape(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            got = checkpoint.read(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_a_read_tensor_is_the_readers_own(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint:
        name = "language_model.model.norm.weight"
        first, second = checkpoint.read(name), checkpoint.read(name)
        first.zero_()
        assert torch.equal(second, checkpoint.read(name))
        assert second.count_nonzero() > 0


def test_many_threads(sharded: Path) -> None:
    expected = read_tensors(sharded)
    names = [name for name in expected for _ in range(3)]
    order = [names[i] for i in torch.randperm(len(names)).tolist()]
    with Checkpoint.open(sharded) as checkpoint, ThreadPoolExecutor(8) as pool:
        for name, got in zip(order, pool.map(checkpoint.read, order), strict=True):
            assert torch.equal(got, expected[name]), name


def test_reads_that_return_a_few_bytes_at_a_time(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_tensors(single)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:777]], offset))
    with Checkpoint.open(single) as checkpoint:
        for name in list(expected)[:40]:
            assert torch.equal(checkpoint.read(name), expected[name])


def test_read_linear(single: Path) -> None:
    expected = read_tensors(single)
    packed = "language_model.model.layers.1.mlp.experts.3.down_proj"
    plain = "language_model.model.layers.1.mlp.shared_experts.down_proj"
    with Checkpoint.open(single) as checkpoint:
        weight = checkpoint.read_linear(packed)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, dequantized(expected[f"{packed}.weight_packed"], expected[f"{packed}.weight_scale"]))
        assert torch.equal(checkpoint.read_linear(plain), expected[f"{plain}.weight"])
        with pytest.raises(CheckpointError, match=r"^nothing.weight: expected a tensor, got none"):
            checkpoint.read_linear("nothing")


def test_lookups(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint:
        assert checkpoint.folder == single
        assert checkpoint.has("language_model.lm_head.weight")
        assert not checkpoint.has("lm_head.weight")
        info = checkpoint.info("language_model.lm_head.weight")
        assert (info.dtype, info.shape, info.nbytes) == ("BF16", (512, 64), 512 * 64 * 2)
        assert info.file == single / "model.safetensors"
        with pytest.raises(CheckpointError, match=r"^lm_head.weight: expected a tensor, got none of that name"):
            checkpoint.info("lm_head.weight")


def test_files_of_the_hub_cache_are_links(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(sharded, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    with Checkpoint.open(snapshot) as checkpoint:
        assert torch.equal(
            checkpoint.read("language_model.lm_head.weight"), read_tensors(sharded)["language_model.lm_head.weight"]
        )


def test_the_index_decides(broken: Path) -> None:
    """Tensors that the index does not name, and a stray single file, are left alone."""
    edit_index(broken, lambda index: index["weight_map"].pop("language_model.lm_head.weight"))
    save_file({"stray": torch.ones(1)}, broken / "model.safetensors")
    with Checkpoint.open(broken) as checkpoint:
        assert not checkpoint.has("language_model.lm_head.weight")
        assert not checkpoint.has("stray")


# Failing while reading.


def test_closed(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match=r"lm_head.weight: expected an open checkpoint, got a closed one"):
        checkpoint.read("language_model.lm_head.weight")


def test_a_file_that_shrinks_after_opening(broken: Path) -> None:
    with Checkpoint.open(broken) as checkpoint:
        last = max(checkpoint.infos.values(), key=lambda info: (info.file.name, info.offset))
        os.truncate(last.file, last.offset + last.nbytes - 1)
        with pytest.raises(CheckpointError, match=f"expected {last.nbytes} bytes, got {last.nbytes - 1}") as error:
            checkpoint.read(last.name)
        assert error.value.message.startswith(last.name)
        assert str(last.file) in error.value.message


def test_a_disk_that_fails(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Checkpoint.open(single) as checkpoint:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as error:
            checkpoint.read("language_model.lm_head.weight")
        assert error.value.message.startswith("language_model.lm_head.weight: ")
        assert str(single / "model.safetensors") in error.value.message


def test_packed_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    good = {"weight_packed": torch.zeros(4, 8, dtype=torch.int32), "weight_shape": torch.tensor([4, 64])}
    scale = torch.zeros(4, 2, dtype=torch.bfloat16)
    cases = [
        ({"weight_scale": scale[:, :1].contiguous()}, r"x.weight_scale: expected shape \[4, 2\], got \[4, 1\]"),
        ({"weight_shape": torch.tensor([64, 4])}, r"x.weight_shape: expected value \[4, 64\], got \[64, 4\]"),
        ({"weight_shape": torch.tensor(4)}, r"x.weight_shape: expected value \[4, 64\], got \[4\]"),
        ({"weight_packed": torch.zeros(32)}, r"x.weight_packed: expected I32 \[out, in/8\], got F32 \[32\]"),
    ]
    for change, message in cases:
        write_tensors(tmp_path, {f"x.{part}": t for part, t in (good | {"weight_scale": scale} | change).items()})
        with (
            Checkpoint.open(tmp_path) as checkpoint,
            pytest.raises(CheckpointError, match=f"{message}.*model.safetensors"),
        ):
            checkpoint.read_packed("x")
    write_tensors(tmp_path, {f"x.{part}": t for part, t in good.items()})
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"x.weight_scale: expected a"):
        checkpoint.read_packed("x")


# Failing while opening.


def test_a_folder_without_weights(tmp_path: Path, sharded: Path) -> None:
    assert "expected model.safetensors.index.json or model.safetensors, got nothing" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "got no .safetensors file" in refusal(tmp_path)
    for shard in sharded.glob("*.safetensors"):
        shutil.copy(shard, tmp_path)
    assert "got 4 other .safetensors files\nhint: the download is incomplete" in refusal(tmp_path)
    assert "No such file or directory" in refusal(tmp_path / "nothing")
    assert "Not a directory" in refusal(tmp_path / "config.json")


def test_a_missing_shard(broken: Path) -> None:
    (broken / "model-00003-of-00004.safetensors").unlink()
    message = refusal(broken)
    assert message.startswith(f"{broken}/model-00003-of-00004.safetensors: expected the file that {INDEX} names")
    assert "hint: the download is incomplete" in message


def test_a_link_to_a_file_that_is_gone(tmp_path: Path) -> None:
    """As in the hub's cache when its blobs were removed: no index has named the file."""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/model.safetensors: expected a file, got a link to one that does not exist")
    assert "hint: the download is incomplete" in message


def test_a_truncated_shard(broken: Path) -> None:
    path = broken / "model-00002-of-00004.safetensors"
    with Checkpoint.open(broken) as checkpoint:
        last = max((i for i in checkpoint.infos.values() if i.file == path), key=lambda info: info.offset)
    os.truncate(path, path.stat().st_size - 1)
    message = refusal(broken)
    assert message.startswith(f"{last.name}: truncated")
    assert str(path) in message
    os.truncate(path, 5)
    assert f"{path}: truncated: expected at least 8 bytes, got a file of 5 bytes" in refusal(broken)


def test_a_tensor_that_its_shard_does_not_hold(broken: Path) -> None:
    edit_index(broken, lambda index: index["weight_map"].update(extra="model-00001-of-00004.safetensors"))
    message = refusal(broken)
    assert message.startswith(f"extra: expected in model-00001-of-00004.safetensors according to {INDEX}, got none")


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "x\0.safetensors"]
)
def test_file_names_that_leave_the_folder(broken: Path, name: str) -> None:
    save_file({"t": torch.ones(1)}, broken.parent / "out.safetensors")
    edit_index(broken, lambda index: index["weight_map"].update(t=name))
    assert f"weight_map: t: expected the name of a .safetensors file in this folder, got {name!r}" in refusal(broken)


@pytest.mark.parametrize("name", [None, 3, "", "model.bin", ["model.safetensors"]])
def test_file_names_of_another_kind(broken: Path, name: object) -> None:
    edit_index(broken, lambda index: index["weight_map"].update(t=name))
    assert "weight_map: t: expected the name of a .safetensors file" in refusal(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected valid JSON"),
        ('{"weight_map": {', "expected valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "weight_map: expected an object of tensor and file names, got None"),
        ('{"weight_map": []}', r"weight_map: expected an object of tensor and file names, got []"),
        ('{"weight_map": {}}', "weight_map: expected an object of tensor and file names, got {}"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "key 'a' twice"),
    ],
)
def test_a_bad_index(broken: Path, text: str, message: str) -> None:
    (broken / INDEX).write_text(text)
    got = refusal(broken)
    assert str(broken / INDEX) in got
    assert message in got


def test_shards_that_are_no_files(broken: Path) -> None:
    path = broken / "model-00001-of-00004.safetensors"
    path.unlink()
    path.mkdir()
    assert f"{path}: expected a file, got something else of that name" in refusal(broken)
    path.rmdir()
    os.mkfifo(path)  # opening it would wait for a writer
    assert f"{path}: expected a file, got something else of that name" in refusal(broken)

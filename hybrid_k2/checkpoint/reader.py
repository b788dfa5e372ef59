"""A checkpoint folder: its index, the headers of all its files, and reading single tensors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor

from hybrid_k2.checkpoint.int4 import GROUP, VALUES_PER_WORD, PackedWeight
from hybrid_k2.checkpoint.opened import OpenedFile
from hybrid_k2.checkpoint.shard import ITEM_BYTES, TensorInfo, read_shard_header
from hybrid_k2.errors import CheckpointError, shown
from hybrid_k2.files import parse_json_object, read_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 1_000_000_000
LINEAR_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape")

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip


class Checkpoint:
    """Know every tensor of a checkpoint and read the ones that are asked for.

    Opening reads the index and the file headers only. Tensors are read with pread into fresh memory, so that one
    checkpoint may serve many threads and the page cache is never mapped. Files stay open until `close`, which must not
    run beside a read.
    """

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo], files: Mapping[Path, OpenedFile]) -> None:
        self.folder = folder
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(dict(infos))
        self.total_bytes = sum(info.nbytes for info in infos.values())  # of all tensors, vision included
        self._files = dict(files)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the index and all file headers, and check that every tensor lies where they say.

        Raises: CheckpointError for a missing or truncated file, a bad index, a damaged header.
        """
        folder = Path(folder)
        weight_map = read_weight_map(folder)
        with ExitStack() as opened:
            files: dict[Path, OpenedFile] = {}
            headers: dict[str, dict[str, TensorInfo]] = {}
            for name in dict.fromkeys(weight_map.values()) if weight_map is not None else [SINGLE_NAME]:
                file = OpenedFile.open(folder / name, INDEX_NAME)
                opened.callback(file.close)
                files[file.path] = file
                headers[name] = _read_header(file)
            infos = headers[SINGLE_NAME] if weight_map is None else _indexed(folder, weight_map, headers)
            opened.pop_all()
        return cls(folder, infos, files)

    def has(self, name: str) -> bool:
        """Say whether there is a tensor of that name."""
        return name in self.infos

    def info(self, name: str) -> TensorInfo:
        """Return what is known of a tensor. Raises: CheckpointError if there is none of that name."""
        try:
            return self.infos[name]
        except KeyError:
            raise CheckpointError(f"{name}: expected a tensor, got none of that name (in {self.folder})") from None

    def read(self, name: str) -> Tensor:
        """Read one tensor into fresh memory. Raises: CheckpointError naming tensor and file."""
        info = self.info(name)
        return self._read(info, 0, info.nbytes).reshape(info.shape)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Read rows first..last-1 of a tensor into fresh memory. Raises: CheckpointError naming tensor and file."""
        info = self.info(name)
        row = info.nbytes // info.shape[0]
        return self._read(info, first * row, (last - first) * row).reshape(last - first, *info.shape[1:])

    def _read(self, info: TensorInfo, start: int, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        file = self.file_of(info)
        file.read_into(buffer.numpy().data, info.offset + start, info.name)
        file.check_unchanged(info.name)
        return buffer.view(TORCH_DTYPES[info.dtype])

    def packed_infos(self, prefix: str) -> tuple[TensorInfo, TensorInfo]:
        """Locate the words and scales of an INT4 matrix, `prefix` being its name without `.weight_packed`.

        Raises: CheckpointError if words, scales and the stored `weight_shape` do not belong together.
        """
        packed, scale, stored = (self.info(f"{prefix}.weight_{part}") for part in ("packed", "scale", "shape"))
        if len(packed.shape) != 2 or packed.dtype != "I32":
            raise CheckpointError(
                f"{packed.name}: expected I32 [out, in/8], got {packed.dtype} {list(packed.shape)} "
                f"(in {packed.file.name})"
            )
        rows, inputs = packed.shape[0], packed.shape[1] * VALUES_PER_WORD
        _expect(scale, "shape", (rows, inputs // GROUP), scale.shape)
        _expect(stored, "value", (rows, inputs), self._read_integers(stored))
        return packed, scale

    def read_packed(self, prefix: str) -> PackedWeight:
        """Read an INT4 matrix. Raises: as `packed_infos`."""
        packed, scale = self.packed_infos(prefix)
        return PackedWeight(self.read(packed.name), self.read(scale.name))

    def _read_integers(self, info: TensorInfo) -> tuple[int, ...]:
        """Read a small tensor of integers; without torch, because a checkpoint has 70,000 of them."""
        buffer, size = bytearray(info.nbytes), ITEM_BYTES[info.dtype]
        self.file_of(info).read_into(memoryview(buffer), info.offset, info.name)
        return tuple(int.from_bytes(buffer[i : i + size], "little", signed=True) for i in range(0, info.nbytes, size))

    def read_linear(self, prefix: str) -> Tensor:
        """Read a matrix [out, in]: `prefix.weight` as it is, or `prefix.weight_packed` dequantised to FP32.

        Raises: CheckpointError.
        """
        if self.has(f"{prefix}.weight_packed"):
            return self.read_packed(prefix).dequantize()
        return self.read(f"{prefix}.weight")

    def file_of(self, info: TensorInfo) -> OpenedFile:
        """Return the file that holds a tensor."""
        return self._files[info.file]

    def linear_shape(self, prefix: str) -> tuple[int, int]:
        """Return rows and inputs of a matrix, in whichever form it is stored. Raises: CheckpointError."""
        if self.has(f"{prefix}.weight_packed"):
            rows, words = self.info(f"{prefix}.weight_packed").shape
            return rows, words * VALUES_PER_WORD
        rows, inputs = self.info(f"{prefix}.weight").shape
        return rows, inputs

    def linear_file(self, prefix: str) -> Path:
        """Return the file that holds the values of one matrix. Raises: CheckpointError."""
        packed = f"{prefix}.weight_packed"
        return self.info(packed if self.has(packed) else f"{prefix}.weight").file

    def linear_bytes(self, prefix: str) -> int:
        """Return the bytes that one matrix takes on disk, in whichever form it is stored."""
        return sum(self.infos[name].nbytes for part in LINEAR_PARTS if (name := f"{prefix}.{part}") in self.infos)

    def close(self) -> None:
        """Close the files; later reads fail."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_weight_map(folder: Path) -> dict[str, str] | None:
    """Return the index's tensor-to-file map, or None where a single file holds everything.

    Raises: CheckpointError: neither is there, or the index is bad.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error
    if INDEX_NAME not in names:
        if SINGLE_NAME in names:
            return None
        raise _no_weights(folder, names)
    place = str(folder / INDEX_NAME)
    text = read_file(folder / INDEX_NAME, CheckpointError, MAX_INDEX_BYTES)
    weight_map = parse_json_object(text, place, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{place}: weight_map: expected an object of tensor and file names, got {shown(weight_map)}"
        )
    inside: set[str] = set()  # a full index names 64 files 208,550 times
    for tensor, file in weight_map.items():
        if isinstance(file, str) and file in inside:
            continue
        if not _stays_inside(file):
            raise CheckpointError(
                f"{place}: weight_map: {tensor}: expected the name of a .safetensors file in this folder, "
                f"got {shown(file)}"
            )
        inside.add(file)
    return weight_map


def _stays_inside(file: object) -> bool:
    if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file or "\\" in file:
        return False
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts


def _no_weights(folder: Path, names: set[str]) -> CheckpointError:
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    found = f"{len(shards)} other .safetensors files" if shards else "no .safetensors file" if names else "nothing"
    hint = f"the download is incomplete: {INDEX_NAME} is missing" if shards else "give the folder of a checkpoint"
    return CheckpointError(f"{folder}: expected {INDEX_NAME} or {SINGLE_NAME}, got {found}", hint=hint)


def _read_header(file: OpenedFile) -> dict[str, TensorInfo]:
    try:
        return read_shard_header(file.path, file.file, file.identity.nbytes)
    except OSError as error:
        raise CheckpointError(f"{file.path}: cannot be read: {error.strerror}") from error


def _indexed(
    folder: Path, weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    infos = {}
    for tensor, file in weight_map.items():
        info = headers[file].get(tensor)
        if info is None:
            raise CheckpointError(
                f"{tensor}: expected in {file} according to {INDEX_NAME}, got none of that name (in {folder / file})"
            )
        infos[tensor] = info
    return infos


def _expect(info: TensorInfo, what: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    if expected != got:
        raise CheckpointError(f"{info.name}: expected {what} {list(expected)}, got {list(got)} (in {info.file.name})")

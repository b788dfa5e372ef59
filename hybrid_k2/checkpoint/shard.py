"""One safetensors file: what its header says, checked against the file before a tensor is read.

A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes; the header gives each tensor's
dtype, shape and byte range behind the header.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from hybrid_k2.errors import CheckpointError, shown
from hybrid_k2.files import LFS_HINT, LFS_POINTER, parse_json_object

# Bytes per element of the dtype names that a header may hold.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
_AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Say where one tensor lies and what it is."""

    name: str
    dtype: str  # the format's name: BF16, F32, I32, ...
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes from the start of the file
    nbytes: int


def read_shard_header(path: Path, file: BinaryIO, file_bytes: int) -> dict[str, TensorInfo]:
    """Read and check the header of one open safetensors file.

    Raises: CheckpointError naming the file and, where there is one, the first tensor affected.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if start == LFS_POINTER[:8]:
        raise CheckpointError(f"{path}: expected a safetensors file, got a Git LFS pointer", hint=LFS_HINT)
    if len(start) < 8 or (length <= MAX_HEADER_BYTES and 8 + length > file_bytes):
        raise CheckpointError(
            f"{path}: truncated: expected {f'a header of {length}' if len(start) == 8 else 'at least 8'} bytes, "
            f"got a file of {file_bytes} bytes",
            hint=_AGAIN,
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, got a length of {length}",
            hint=_AGAIN,
        )
    tensors = _parse_header(path, _read_exactly(path, file, length), 8 + length)
    _check_layout(path, tensors, 8 + length, file_bytes)
    return {info.name: info for info in tensors}


def _read_exactly(path: Path, file: BinaryIO, length: int) -> bytes:
    parts = []
    while length and (part := file.read(length)):
        parts.append(part)
        length -= len(part)
    if length:
        raise CheckpointError(f"{path}: truncated: {length} bytes of the header are missing")
    return b"".join(parts)


def _parse_header(path: Path, text: bytes, data_start: int) -> list[TensorInfo]:
    try:
        header = parse_json_object(text, f"{path}: safetensors header", CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(error.message, hint=_AGAIN) from None
    header.pop("__metadata__", None)
    return [_parse_entry(path, name, entry, data_start) for name, entry in header.items()]


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{name}: expected an object in the header, got {shown(entry)} (in {path})")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{name}: expected a known dtype, got {shown(dtype)} (in {path})")
    if not _is_sizes(shape):
        raise CheckpointError(f"{name}: expected a shape of non-negative integers, got {shown(shape)} (in {path})")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{name}: expected data_offsets [begin, end], got {shown(offsets)} (in {path})")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise CheckpointError(
            f"{name}: expected {shown(nbytes)} bytes for {dtype} {shown(shape)}, "
            f"got data_offsets of {end - begin} (in {path})"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """Check that the byte ranges do not overlap and lie within the file; gaps between them do no harm."""
    end, last = data_start, None
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if last is not None and info.offset < end:
            raise CheckpointError(
                f"{info.name}: expected bytes of its own, got an overlap with {last.name} (in {path})"
            )
        end, last = info.offset + info.nbytes, info
        if end > file_bytes:
            needed = max(one.offset + one.nbytes for one in tensors)
            raise CheckpointError(
                f"{info.name}: truncated: expected a file of at least {needed} bytes, got {file_bytes} (in {path})",
                hint=_AGAIN,
            )

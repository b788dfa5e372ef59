"""Save a prefix cache to a file, and read it again: whole and unchanged, or not at all.

The file: MAGIC; the latents of each node, one after the other; an index in JSON; its length (8 bytes) and its SHA-256;
MAGIC again. The index names the engine's fingerprint and holds, for each node, the place of its parent in the index (-1
for none), its salt, its tokens, how many of them are repeatable, and a digest of its latents. The file is written under
another name, and gets its own when it is complete and on the disk: a process that dies leaves the old file or none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hybrid_k2.engine.prefix import Node, PrefixCache
from hybrid_k2.errors import ConfigError
from hybrid_k2.files import check_writable
from hybrid_k2.placement.sizes import format_bytes

log = logging.getLogger("hybrid_k2")

_KIND = b"hybrid-k2 prefix cache, version "
_MAGIC = _KIND + b"1\n"
_TAIL = 8 + 32 + len(_MAGIC)


def check_prefix_file(path: Path) -> None:
    """Make sure that a prefix cache can be saved there, and that nothing else is lost by it; make its folder.

    Raises: ConfigError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: expected a folder that can be made for it, got {reason}") from error
    for file in (path, _partial(path)):
        check_writable(file, "prefix cache", _KIND)


def _partial(path: Path) -> Path:
    """Return where a cache is written until it is whole."""
    return path.parent / f"{path.name}.partial"


def save_prefixes(prefix: PrefixCache, path: Path, fingerprint: str) -> None:
    """Write what was used most recently, as much as the second level could take back. A failure is logged."""
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # it tells what users asked
        with os.fdopen(descriptor, "wb") as file:
            count = _write(file, prefix, fingerprint)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError, MemoryError) as error:  # the disk, a GPU that is gone, a host that is full
        log.warning("%s: the prefix cache could not be saved: %s", path, error)
        with suppress(OSError):
            partial.unlink()
        return
    log.info("%s: saved %d pages of the prefix cache, %s", path, count, format_bytes(path.stat().st_size))


def restore_prefixes(prefix: PrefixCache, path: Path, fingerprint: str) -> int:
    """Fill the second level from a file and return the pages; 0, with a warning, if the file is not what it should be.

    A file that is not there is none to warn of.
    """
    try:
        with path.open("rb") as file:
            nodes = _read(file, prefix, fingerprint)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, LookupError, TypeError, RecursionError, MemoryError) as error:
        log.warning("%s: the saved prefix cache is not used: %s", path, error)
        return 0
    count = prefix.restore(nodes)
    log.info("%s: read %d pages of the prefix cache", path, count)
    return count


def _write(file: BinaryIO, prefix: PrefixCache, fingerprint: str) -> int:
    file.write(_MAGIC)
    places: dict[Node, int] = {}
    entries = []
    for salt, node in islice(prefix.nodes(), prefix.ram_pages):
        assert node.parent is not None
        data = prefix.content(node).contiguous().view(torch.uint8).numpy().tobytes()
        file.write(data)
        entries.append(
            {
                "parent": -1 if node.parent.parent is None else places[node.parent],
                "salt": salt,
                "tokens": node.tokens,
                "repeatable": node.repeatable,
                "digest": _digest(data),
            }
        )
        places[node] = len(places)
    index = json.dumps({"fingerprint": fingerprint, "nodes": entries}).encode()
    file.write(index + len(index).to_bytes(8, "little") + hashlib.sha256(index).digest() + _MAGIC)
    return len(entries)


def _read(file: BinaryIO, prefix: PrefixCache, fingerprint: str) -> list[tuple[str, Node]]:
    """Return the nodes with their salts, as many as fit. Raises: ValueError saying what is wrong with the file."""
    index, payload_bytes = _read_index(file)
    if index["fingerprint"] != fingerprint:
        raise ValueError("it was written by another model, plan or version")
    entries = index["nodes"]
    page = prefix.page_like()
    if payload_bytes != len(entries) * page.nbytes:
        raise ValueError(f"expected {len(entries)} pages of {page.nbytes} bytes, got {payload_bytes} bytes")
    file.seek(len(_MAGIC))
    return [*_nodes(file, entries[: prefix.ram_pages], page)]


def _read_index(file: BinaryIO) -> tuple[dict[str, Any], int]:
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("it is not a prefix cache of this version")
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    length, digest, magic = int.from_bytes(tail[:8], "little"), tail[8:40], tail[40:]
    payload_bytes = size - _TAIL - length - len(_MAGIC)
    if magic != _MAGIC or payload_bytes < 0:
        raise ValueError("it is not complete")
    file.seek(len(_MAGIC) + payload_bytes)
    index = file.read(length)
    if hashlib.sha256(index).digest() != digest:
        raise ValueError("its index is damaged")
    return json.loads(index), payload_bytes


def _nodes(file: BinaryIO, entries: list[dict[str, Any]], page: Tensor) -> Iterator[tuple[str, Node]]:
    nodes: list[Node] = []
    for place, entry in enumerate(entries):
        data = bytearray(page.nbytes)
        if file.readinto(data) != len(data) or _digest(data) != entry["digest"]:  # type: ignore[attr-defined]
            raise ValueError(f"page {place} is damaged")
        latents = torch.frombuffer(data, dtype=torch.uint8).view(page.dtype).view(page.shape)
        parent = nodes[entry["parent"]] if entry["parent"] >= 0 else None
        nodes.append(Node(tuple(entry["tokens"]), parent, entry["repeatable"], stored=latents))
        yield entry["salt"], nodes[-1]


def _digest(data: bytes | bytearray) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()

"""The vocabulary files of a checkpoint: tiktoken.model and tokenizer_config.json."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from hybrid_k2.errors import CheckpointError, shown
from hybrid_k2.files import parse_json_object, read_file

SPECIAL_COUNT = 256  # ids kept for special tokens above the byte-pair ranks
_RANK = re.compile(rb"[0-9]{1,12}")
_ID = re.compile(r"0|[1-9][0-9]{0,11}")


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the byte-pair ranks: one `base64(token bytes) SPACE rank` a line, ranks 0..N-1, all 256 bytes.

    Raises: CheckpointError naming file and line.
    """
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(read_file(path, CheckpointError).splitlines(), start=1):
        if not line.strip():
            continue
        token, rank = _parse_rank(line, f"{path}:{number}")
        if token in ranks:
            raise CheckpointError(
                f"{path}:{number}: token {token!r}: expected once, got it again (rank {ranks[token]})"
            )
        if rank in line_of_rank:
            raise CheckpointError(
                f"{path}:{number}: rank {rank}: expected once, got it on line {line_of_rank[rank]} too"
            )
        ranks[token] = rank
        line_of_rank[rank] = number
    _check_complete(path, ranks, line_of_rank)
    return ranks


def read_special(path: Path, base: int) -> dict[str, int]:
    """Read the names of the special tokens, ids base..base+255; an id without a name is `<|reserved_token_ID|>`.

    Raises: CheckpointError naming file and place.
    """
    names: dict[int, str] = {}
    for key, entry in _added_tokens(path).items():
        place = f"{path}: added_tokens_decoder[{shown(key)}]"
        if not _ID.fullmatch(key) or not base <= int(key) < base + SPECIAL_COUNT:
            raise CheckpointError(f"{place}: expected an id in {base}..{base + SPECIAL_COUNT - 1}, got {shown(key)}")
        name = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{place}.content: expected the token's text, got {shown(name)}")
        names[int(key)] = name
    special: dict[str, int] = {}
    for token_id in range(base, base + SPECIAL_COUNT):
        name = names.get(token_id, f"<|reserved_token_{token_id}|>")
        if name in special:
            raise CheckpointError(f"{path}: special token {name}: expected one id, got {special[name]} and {token_id}")
        special[name] = token_id
    return special


def _parse_rank(line: bytes, place: str) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2 or not _RANK.fullmatch(fields[1]):
        raise CheckpointError(f"{place}: expected 'base64 rank', got {line[:60]!r}")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error as error:
        raise CheckpointError(f"{place}: token: expected base64, got {fields[0][:60]!r}") from error
    if not token:
        raise CheckpointError(f"{place}: token: expected at least one byte, got none")
    return token, int(fields[1])


def _check_complete(path: Path, ranks: dict[bytes, int], line_of_rank: dict[int, int]) -> None:
    for rank in range(len(ranks)):
        if rank not in line_of_rank:
            highest = max(line_of_rank)
            place = f"{path}:{line_of_rank[highest]}"
            raise CheckpointError(
                f"{place}: ranks: expected 0..{len(ranks) - 1} without a gap, got {highest} and no {rank}"
            )
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise CheckpointError(f"{path}: expected a rank for each of the 256 bytes, got none for {byte:#04x}")


def _added_tokens(path: Path) -> dict[str, object]:
    config = parse_json_object(read_file(path, CheckpointError), str(path), CheckpointError)
    added = config.get("added_tokens_decoder")
    if not isinstance(added, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder: expected an object of ids, got {type(added).__name__}")
    return added

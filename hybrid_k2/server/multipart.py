"""The form of an upload, `multipart/form-data`: a file and small fields."""

from __future__ import annotations

import re
from email.parser import HeaderParser
from typing import NamedTuple

from hybrid_k2.server.errors import ApiError, bad_request

MAX_PARTS = 10
MAX_HEADER_BYTES = 4096  # of one part
_BOUNDARY = re.compile(r'multipart/form-data\s*;\s*boundary=(?:"([^"\s]{1,70})"|([^";,\s]{1,70}))\s*', re.IGNORECASE)


class Upload(NamedTuple):
    """A file and the fields beside it."""

    filename: str
    content: bytes
    fields: dict[str, str]


class _Part(NamedTuple):
    name: str
    filename: str | None
    content: bytes


def read_upload(content_type: str, body: bytes) -> Upload:
    """Read a form with one part named `file`, in time linear in the body. Raises: ApiError."""
    boundary = _BOUNDARY.fullmatch(content_type)
    if boundary is None:
        raise ApiError(400, "body: expected multipart/form-data with a boundary", param="file")
    fields: dict[str, str] = {}
    file: _Part | None = None
    for part in _split(body, (boundary[1] or boundary[2]).encode("utf-8", "replace")):
        if part.name in fields or (part.name == "file" and file is not None):
            raise bad_request(part.name, "expected it once in the form, got it twice")
        if part.name == "file":
            file = part
        else:
            fields[part.name] = part.content.decode("utf-8", "replace")
    if file is None:
        raise bad_request("file", "expected a part of this name, got none")
    return Upload(file.filename or "file", file.content, fields)


def _split(body: bytes, boundary: bytes) -> list[_Part]:
    before, *pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARTS + 2)
    if before or len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise bad_request("file", f"expected a form of 1 to {MAX_PARTS} parts, from its first boundary to its last")
    return [_read_part(piece) for piece in pieces[:-1]]


def _read_part(piece: bytes) -> _Part:
    head, blank, content = piece.partition(b"\r\n\r\n")
    if not blank or not head.startswith(b"\r\n") or len(head) > MAX_HEADER_BYTES:
        raise bad_request("file", "expected short headers and a blank line in each part of the form")
    # The old policy of `email`, which is the default, reads parameters without recursion.
    headers = HeaderParser().parsestr(head[2:].decode("utf-8", "replace"))
    name = headers.get_param("name", header="content-disposition")
    if not isinstance(name, str) or not 1 <= len(name) <= 100:
        raise bad_request("file", "expected a name of 1 to 100 characters for each part of the form")
    return _Part(name, headers.get_filename(), content)

"""Where the bytes of an image or a video are: inside a message, and nowhere else."""

from __future__ import annotations

import base64

from hybrid_k2.errors import RequestError, shown
from hybrid_k2.protocol.messages import Media

_MAX_HEAD = 1024  # characters of a data: URI before its comma
_NAMES = {"image": "an image", "video": "a video"}
_EXPECTED = {"image": "an image as data:image/png;base64,...", "video": "a video as data:video/mp4;base64,..."}


def media_source(media: Media, place: str) -> bytes:
    """Return the bytes of the file that a message holds, as such or in a data: URI.

    Raises: RequestError naming `place`.
    """
    source = media.source
    if isinstance(source, str):
        data = _data_of_uri(source, media.kind, place)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    else:
        found = "nothing" if source is None else type(source).__name__
        raise RequestError(f"{place}: expected {_EXPECTED[media.kind]}, or bytes, got {found}")
    if not data:
        raise RequestError(f"{place}: expected {_NAMES[media.kind]}, got no bytes")
    return data


def _data_of_uri(uri: str, kind: str, place: str) -> bytes:
    head, _, _ = uri[:_MAX_HEAD].partition(",")
    media_type, *parameters = head.lower().split(";")
    if not media_type.startswith(f"data:{kind}/") or parameters[-1:] != ["base64"]:
        raise RequestError(
            f"{place}: expected {_EXPECTED[kind]}, got {shown(uri[:200])}",
            hint=f"{kind}s are sent inside the message: no address is fetched and no file is opened",
        )
    try:
        text = uri[len(head) + 1 :].encode("ascii").translate(None, b" \t\r\n\f")
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise RequestError(f"{place}: expected {_NAMES[kind]} in base64, got other text") from None

"""Images and videos for a message: read from files, told by their first bytes, sent inside the message."""

from __future__ import annotations

import base64
import re
import warnings
from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from hybrid_k2.cli.chat.files import read_bytes
from hybrid_k2.errors import ConfigError, RequestError, shown
from hybrid_k2.placement.sizes import format_bytes

MEDIA = {"image": "images", "video": "video"}  # what messages may hold beside text, and what a model reads of it
# Media types by what files begin with, `.` for any byte.
_BEGINNINGS = {
    "image": {
        rb"\x89PNG\r\n\x1a\n": "png",
        rb"\xff\xd8\xff": "jpeg",
        rb"GIF8[79]a": "gif",
        rb"RIFF....WEBP": "webp",
    },
    "video": {
        rb"....ftypqt|....(moov|mdat|wide|free)": "quicktime",
        rb"....ftyp3g": "3gpp",
        rb"....ftyp": "mp4",
        rb"\x1aE\xdf\xa3": "webm",
        rb"RIFF....AVI ": "x-msvideo",
        rb"FLV\x01": "x-flv",
        rb"\x00\x00\x01[\xb3\xba]": "mpeg",
        rb"0&\xb2u\x8ef\xcf\x11": "x-ms-wmv",
    },
}
_ORIENTATION = 0x0112  # the tag of Exif
_QUALITY = 95  # of the JPEG that a turned photo becomes
_FORMATS = {"image": "PNG, JPEG, WebP or GIF", "video": "MP4, MOV, 3GPP, AVI, FLV, WebM, MPEG or WMV"}


class Attached(NamedTuple):
    """An image or a video file that goes with a message."""

    medium: str  # "image" or "video"
    name: str
    kind: str  # behind the slash of its media type
    data: bytes

    def __str__(self) -> str:
        return f"{self.name}, {format_bytes(len(self.data))}"

    def part(self) -> dict[str, Any]:
        """Return the part of a message's content that holds it."""
        url = f"data:{self.medium}/{self.kind};base64,{base64.b64encode(self.data).decode('ascii')}"
        return {"type": f"{self.medium}_url", f"{self.medium}_url": {"url": url}}


def attach(medium: str, path: Path) -> Attached:
    """Read an image or a video file; a photo is turned as it is shown.

    Raises: ConfigError: it cannot be read, is over 64 MiB, or of another format.
    """
    data = read_bytes(path)
    for beginning, kind in _BEGINNINGS[medium].items():
        if re.match(beginning, data, re.DOTALL):
            return Attached(medium, path.name, kind, _upright(data) if kind == "jpeg" else data)
    got = f"one that begins with {shown(data[:12])}" if data else "an empty one"
    raise ConfigError(f"{path}: expected {'a' if medium == 'image' else 'an'} {_FORMATS[medium]} file, got {got}")


def content_of(text: str, attached: Sequence[Attached]) -> str | list[dict[str, Any]]:
    """Return the content of a message: the text alone, or what is attached and then the text."""
    return [*(one.part() for one in attached), {"type": "text", "text": text}] if attached else text


def is_content(value: Any) -> bool:
    """Say whether this is such a content, as a saved conversation has it."""
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_part, value)))


def check_attached(attached: Sequence[Attached], model: str) -> None:
    """Refuse what the engine would, before the weights of a checkpoint are loaded or downloaded.

    Raises: RequestError: the model reads text only, or a file is damaged; CheckpointError, ConfigError,
    UnsupportedModelError: its configuration cannot be read.
    """
    from hybrid_k2.config import ModelConfig
    from hybrid_k2.engine.loading import find_configuration
    from hybrid_k2.protocol import ImageFormat, check_video, read_image

    folder = find_configuration(model)
    sees = MEDIA if ModelConfig.load(folder).vision is not None else ()
    wanted = ImageFormat.load(folder)
    for medium, name, _, data in attached:
        require_sight(sees, medium, model, f"--{medium}")
        if medium == "image":
            read_image(data, wanted, f"--image {name}")
        else:
            check_video(data, f"--video {name}")


def require_sight(sees: Collection[str], medium: str, model: str, place: str) -> None:
    """Refuse an image or a video where the model, which `sees` these media, cannot read it. Raises: RequestError."""
    if medium not in sees:
        reads = " and ".join(("text", *(MEDIA[one] for one in sees)))
        raise RequestError(
            f"{place}: expected a model that reads {MEDIA[medium]}, got {model}, which reads {reads} only"
        )


def _upright(photo: bytes) -> bytes:
    """Turn a JPEG as its Exif says that it is shown, which the model's processor does not do.

    It stays as it is where that says nothing, without Pillow, and if it is damaged: who reads it will say so.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        return photo
    turned = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is odd in the file
        try:
            with Image.open(BytesIO(photo), formats=["JPEG"]) as image:
                if image.getexif().get(_ORIENTATION, 1) == 1:
                    return photo
                ImageOps.exif_transpose(image).save(turned, "JPEG", quality=_QUALITY)
        except Exception:  # a decoder that meets nonsense raises whatever it met
            return photo
    return turned.getvalue()


def _is_part(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return part.keys() == {"type", "text"} and isinstance(part["text"], str)
    medium = next((one for one in MEDIA if kind == f"{one}_url" and part.keys() == {"type", kind}), None)
    source = None if medium is None else part[kind]
    url = source.get("url") if isinstance(source, dict) and source.keys() == {"url"} else None
    return isinstance(url, str) and url.startswith(f"data:{medium}/")

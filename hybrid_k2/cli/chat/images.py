"""Images for a message: read from files, told by their first bytes, sent inside the message."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from hybrid_k2.cli.chat.files import read_bytes
from hybrid_k2.errors import ConfigError, RequestError, shown
from hybrid_k2.placement.sizes import format_bytes

_BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
}
_DATA_URI = "data:image/"
_ORIENTATION = 0x0112  # the tag of Exif
_QUALITY = 95  # of the JPEG that a turned photo becomes


class AttachedImage(NamedTuple):
    """An image file that goes with a message."""

    name: str
    kind: str  # png, jpeg, webp or gif
    data: bytes

    def __str__(self) -> str:
        return f"{self.name}, {format_bytes(len(self.data))}"

    def part(self) -> dict[str, Any]:
        """Return the part of a message's content that holds it."""
        url = f"{_DATA_URI}{self.kind};base64,{base64.b64encode(self.data).decode('ascii')}"
        return {"type": "image_url", "image_url": {"url": url}}


def attach_image(path: Path) -> AttachedImage:
    """Read an image file; a photo is turned as it is shown.

    Raises: ConfigError: it cannot be read, is over 64 MiB, or is no PNG, JPEG, WebP or GIF.
    """
    data = read_bytes(path)
    kind = _kind(data)
    if kind is None:
        got = f"one that begins with {shown(data[:12])}" if data else "an empty one"
        raise ConfigError(f"{path}: expected a PNG, JPEG, WebP or GIF file, got {got}")
    return AttachedImage(path.name, kind, _upright(data) if kind == "jpeg" else data)


def content_of(text: str, images: Sequence[AttachedImage]) -> str | list[dict[str, Any]]:
    """Return the content of a message: the text alone, or the images and then the text."""
    return [*(image.part() for image in images), {"type": "text", "text": text}] if images else text


def is_content(value: Any) -> bool:
    """Say whether this is such a content, as a saved conversation has it."""
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_part, value)))


def check_images(images: Sequence[AttachedImage], model: str) -> None:
    """Refuse what the engine would, before the weights of a checkpoint are loaded or downloaded.

    Raises: RequestError: the model reads text only, or an image is damaged; CheckpointError, ConfigError,
    UnsupportedModelError: its configuration cannot be read.
    """
    from hybrid_k2.config import ModelConfig
    from hybrid_k2.engine.loading import find_configuration
    from hybrid_k2.protocol import ImageFormat, read_image

    folder = find_configuration(model)
    require_sight(ModelConfig.load(folder).vision is not None, model, "--image")
    wanted = ImageFormat.load(folder)
    for image in images:
        read_image(image.data, wanted, f"--image {image.name}")


def require_sight(sees_images: bool, model: str, place: str) -> None:
    """Refuse images where the model cannot read them. Raises: RequestError."""
    if not sees_images:
        raise RequestError(f"{place}: expected a model that reads images, got {model}, which reads text only")


def _kind(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for beginning, kind in _BEGINNINGS.items() if data.startswith(beginning)), None)


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
    image = part.get("image_url") if kind == "image_url" and part.keys() == {"type", "image_url"} else None
    url = image.get("url") if isinstance(image, dict) and image.keys() == {"url"} else None
    return isinstance(url, str) and url.startswith(_DATA_URI)

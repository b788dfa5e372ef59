"""Image files of strangers, made into pixels.

Whatever the bytes are, the outcome is pixels or one RequestError. No file is opened and no connection made; what Pillow
says about a file (its messages hold addresses of memory) and what it warns of stay here.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING

from hybrid_k2.errors import MemoryBudgetError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.ImageFile import ImageFile

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_PIXELS = 2**27  # medium-format cameras have 102 million; decoding takes up to 8 bytes for each
MAX_SIDE = 65_535  # as JPEG and GIF have it; resizing takes memory by the side, too
MAX_SCANNED_PIXELS = 2**31  # pixels times scans of a JPEG: a scan may be some bytes, and goes over the whole image

# One image at a time: this bounds the memory, and what silences warnings is the process's, not a thread's.
_decoding = threading.Lock()


def decode_pixels(data: bytes, fit: Callable[[int, int], tuple[int, int]], place: str) -> NDArray[np.uint8]:
    """Decode an image file to RGB [height, width, 3], resized to what `fit` makes of its (width, height).

    As the model's own processor does: transparency is dropped, orientation in EXIF is not applied, of an animation the
    first frame counts.
    Raises: RequestError naming `place`; MemoryBudgetError.
    """
    import numpy as np

    try:
        import PIL.Image
    except ImportError:
        raise RequestError(
            f"{place}: expected Pillow to read the image with, got no such package", hint="pip install pillow"
        ) from None
    with _decoding, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with PIL.Image.open(BytesIO(data), formats=FORMATS) as image:
                _check_size(image, data, place)
                rgb = image if image.mode == "RGB" else image.convert("RGB")
                size = fit(*image.size)
                return np.asarray(rgb if size == rgb.size else rgb.resize(size, PIL.Image.Resampling.BICUBIC))
        except RequestError:
            raise
        except PIL.Image.DecompressionBombError:
            raise RequestError(f"{place}: expected an image of at most {MAX_PIXELS} pixels, got more") from None
        except MemoryError:
            raise MemoryBudgetError(f"{place}: expected memory to decode an image, got none left") from None
        except Exception:  # a decoder that meets nonsense raises whatever it met
            raise RequestError(
                f"{place}: expected a PNG, JPEG, WebP or GIF image, got {len(data)} bytes that cannot be read as one",
                hint="the file is of another format, damaged or cut short",
            ) from None


def _check_size(image: ImageFile, data: bytes, place: str) -> None:
    """Refuse what would take too much memory or time, before it is decoded."""
    width, height = image.size
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise RequestError(
            f"{place}: expected an image of at most {MAX_PIXELS} pixels, and from 1 to {MAX_SIDE} a side, "
            f"got {width} x {height}"
        )
    scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1  # inside a scan, 0 follows each 255
    if scans * width * height > MAX_SCANNED_PIXELS:
        raise RequestError(
            f"{place}: expected a JPEG image of at most {MAX_SCANNED_PIXELS} pixels in all its scans, "
            f"got {scans} scans of {width} x {height}"
        )

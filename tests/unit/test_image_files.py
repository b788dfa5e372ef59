"""Files of strangers become pixels or one RequestError: no warning, no exception of the decoder, no large memory."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import re
import resource
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hybrid_k2.errors import MemoryBudgetError, RequestError
from hybrid_k2.protocol import ImageFormat, encode_chat, media_source, read_image
from hybrid_k2.protocol.image_files import MAX_PIXELS, MAX_SIDE, decode_pixels
from hybrid_k2.protocol.messages import Media
from tests.protocol_strategies import small_tokenizer

pillow = pytest.importorskip("PIL.Image", reason="Pillow decodes the images: pip install pillow")

K26 = ImageFormat()
PLACE = "messages[0].content[1].image_url"


def noise(width: int, height: int, seed: int = 0) -> Any:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return pillow.fromarray(pixels)


def smooth(width: int, height: int) -> Any:
    """Return a picture without edges, which a JPEG keeps well."""
    return noise(2, 2).resize((width, height))


def saved(image: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, width: int, height: int) -> np.ndarray:
    """Return the pixels of an image that is too small to be scaled, without what was added."""
    pixels = read_image(data, K26, PLACE).pixels
    assert not pixels[height:].any()
    assert not pixels[:, width:].any()
    return pixels[:height, :width]


def refusal(data: bytes) -> str:
    with pytest.raises(RequestError) as error:
        read_image(data, K26, PLACE)
    message = str(error.value)
    assert message.startswith(f"{PLACE}: expected ")
    assert "0x" not in message  # an address of memory helps an attacker
    return message


ONE = saved(noise(2, 2), "PNG")

# -- what is taken

FILES: dict[str, Callable[[Any], bytes]] = {
    "png": lambda image: saved(image, "PNG"),
    "jpeg": lambda image: saved(image, "JPEG", quality=90),
    "progressive jpeg": lambda image: saved(image, "JPEG", progressive=True),
    "webp": lambda image: saved(image, "WEBP"),
    "lossless webp": lambda image: saved(image, "WEBP", lossless=True),
    "gif": lambda image: saved(image, "GIF"),
    "interlaced gif": lambda image: saved(image.quantize(), "GIF", interlace=1),
}
LOSSLESS = {"png", "lossless webp"}


@pytest.mark.parametrize("kind", FILES)
def test_pixels_of_each_format(kind: str) -> None:
    picture = smooth(37, 61)
    got = decoded(FILES[kind](picture), 37, 61).astype(int)
    # Lossy formats keep a smooth picture on average within a few of 256 steps; a shift or a swapped channel does not.
    assert abs(got - np.asarray(picture)).mean() <= (0 if kind in LOSSLESS else 5)


def with_transparency(mode: str, transparency: Any) -> bytes:
    return saved(noise(20, 30).convert(mode), "PNG", transparency=transparency)


@pytest.mark.parametrize(
    "data",
    [
        *(saved(noise(20, 30).convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")),
        saved(pillow.fromarray(np.arange(600, dtype=np.uint16).reshape(30, 20) * 109), "PNG"),
        with_transparency("L", 7),
        with_transparency("RGB", (1, 2, 3)),
        with_transparency("P", 3),
        with_transparency("P", bytes(range(200))),
        *(saved(noise(20, 30).convert(mode), "JPEG") for mode in ("L", "CMYK")),
        saved(noise(20, 30).convert("RGBA"), "WEBP", lossless=True),
        saved(noise(20, 30), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    ],
)
def test_colours_are_converted_as_the_models_own_processor_does(data: bytes) -> None:
    """Transparency is dropped, whatever colour lies under it; orientation is not applied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(pillow.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decoded(data, 20, 30), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_colours_are_converted_before_an_image_is_scaled(mode: str) -> None:
    picture = noise(200, 90).convert(mode)
    small = ImageFormat(patch_limit=40)
    size = small.fit(200, 90)
    assert size[0] < 200
    expected = np.asarray(picture.convert("RGB").resize(size, pillow.Resampling.BICUBIC))
    got = read_image(saved(picture, "PNG"), small, PLACE).pixels
    assert np.array_equal(got[: size[1], : size[0]], expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    red, blue = (pillow.new("RGB", (30, 20), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    data = saved(red, kind, save_all=True, append_images=[blue], **({"lossless": True} if kind == "WEBP" else {}))
    assert pillow.open(io.BytesIO(data)).n_frames == 2
    assert (decoded(data, 30, 20) == (255, 0, 0)).all()


def test_the_first_picture_of_a_camera_file_counts() -> None:
    """A JPEG of several pictures (MPO), as phones write it."""
    first = smooth(30, 20)
    data = saved(first, "MPO", save_all=True, append_images=[noise(8, 8)])
    assert np.array_equal(decoded(data, 30, 20), decoded(saved(first, "JPEG"), 30, 20))


def test_the_content_counts_and_not_the_type() -> None:
    part = {"type": "image_url", "image_url": {"url": uri(saved(noise(9, 9), "GIF"), "image/jpeg")}}
    _, images = encode_chat(small_tokenizer(), [{"role": "user", "content": [part]}], images=K26)
    assert len(images) == 1


# -- what is refused: files


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_says(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg_that_says(width: int, height: int) -> bytes:
    data = bytearray(saved(smooth(16, 16), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_that_says(width: int, height: int) -> bytes:
    data = bytearray(saved(noise(4, 4), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def webp_that_says(width: int, height: int) -> bytes:
    """Return the header of an extended file with that canvas, and a frame of it that is cut."""
    data = saved(noise(4, 4), "WEBP", save_all=True, append_images=[noise(4, 4, 1)], lossless=True)
    at = data.index(b"VP8X") + 12
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return data[:at] + sizes + data[at + 6 :]


@pytest.mark.parametrize(
    "data",
    [
        png_that_says(100_000, 100_000),
        png_that_says(20_000, 20_000),
        png_that_says(12_000, 12_000),
        png_that_says(2**31 - 1, 1),
        png_that_says(1, MAX_SIDE + 1),
        jpeg_that_says(65_535, 65_535),
        jpeg_that_says(12_000, 12_000),
        gif_that_says(65_535, 65_535),
        gif_that_says(12_000, 12_000),
        webp_that_says(16_383, 16_383),
        webp_that_says(12_000, 12_000),
    ],
)
def test_bombs_are_refused_before_they_are_decoded(data: bytes) -> None:
    assert len(data) < 3000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"an image of at most {MAX_PIXELS} pixels" in refusal(data)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # KiB; the smallest of them decodes to 432 MB


@pytest.mark.parametrize("data", [png_that_says(0, 0), png_that_says(5, 0), jpeg_that_says(9, 0)])
def test_images_without_pixels(data: bytes) -> None:
    refusal(data)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """Each of the scans takes some bytes, and as long to decode as the first."""
    data = saved(pillow.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    many = data[:last] + data[last:-2] * 3000 + data[-2:]
    assert len(many) < 500_000
    assert "JPEG image of at most 2147483648 pixels in all its scans, got 30" in refusal(many)
    few = data[:last] + data[last:-2] * 3 + data[-2:]
    assert read_image(few, K26, PLACE).digest == read_image(data, K26, PLACE).digest


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\0", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.7\n", SVG),
        *(saved(noise(9, 9), kind) for kind in ("TIFF", "BMP", "ICO", "PPM", "TGA", "PCX")),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"RIFF\xff\xff\xff\xffWEBP",
    ],
)
def test_other_files_are_refused(data: bytes) -> None:
    assert "expected a PNG, JPEG, WebP or GIF image, got" in refusal(data)


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_cut_are_refused(kind: str) -> None:
    data = FILES[kind](noise(40, 50))
    for length in (len(data) // 2, len(data) * 3 // 4, len(data) * 9 // 10):
        assert f"got {length} bytes that cannot be read as one" in refusal(data[:length])
    chance = random.Random(1)
    for length in chance.sample(range(len(data)), min(60, len(data))):
        outcome(data[:length])


def outcome(data: bytes) -> None:
    """Read an image, of which nothing else than pixels or a RequestError may come."""
    with contextlib.suppress(RequestError):
        assert read_image(data, K26, PLACE).tokens > 0


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_give_pixels_or_one_error(kind: str) -> None:
    data = FILES[kind](smooth(40, 50))
    chance = random.Random(2)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(chance.randrange(1, 5)):
            place = chance.choice([chance.randrange(len(data)), chance.randrange(min(64, len(data)))])
            damaged[place] = chance.randrange(256)
        if chance.random() < 0.2:
            damaged[chance.randrange(len(data)) :] = chance.randbytes(chance.randrange(40))
        outcome(bytes(damaged))


def test_metadata_that_warn_are_silent() -> None:
    """A broken EXIF block, and animation chunks where none belong."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"
    decoded(saved(smooth(20, 30), "JPEG", exif=exif), 20, 30)
    animation = chunk(b"acTL", struct.pack(">II", 0, 0))
    data = saved(smooth(20, 30), "PNG")
    end = data.index(b"IEND") - 4
    start = data.index(b"IDAT") - 4
    decoded(data[:start] + animation * 2 + data[start:end] + animation * 2 + data[end:], 20, 30)


def test_threads_decode_without_disturbing_warnings() -> None:
    data = with_transparency("P", bytes(range(200)))
    filters = list(warnings.filters)
    digests: list[int] = []
    threads = [
        threading.Thread(target=lambda: digests.extend(read_image(data, K26, PLACE).digest for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 80
    assert len(set(digests)) == 1
    assert warnings.filters == filters


def test_one_image_is_decoded_at_a_time() -> None:
    """What decoding takes at most is the memory of one image, however many threads decode."""
    other = threading.Thread(target=decode_pixels, args=(ONE, K26.fit, PLACE))

    def fit(width: int, height: int) -> tuple[int, int]:
        other.start()
        other.join(timeout=0.2)
        assert other.is_alive()
        return width, height

    assert decode_pixels(ONE, fit, PLACE).shape == (2, 2, 3)
    other.join()


def test_memory_that_runs_out_is_not_the_file_s_fault() -> None:
    def fit(width: int, height: int) -> tuple[int, int]:
        raise MemoryError

    with pytest.raises(MemoryBudgetError, match=rf"^{re.escape(PLACE)}: expected memory to decode an image"):
        decode_pixels(ONE, fit, PLACE)


def test_without_pillow_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(noise(3, 3), "PNG")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert refusal(data).endswith("hint: pip install pillow")


# -- what is refused: where the bytes are


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


BODY = base64.b64encode(ONE).decode()


@pytest.mark.parametrize(
    "source",
    [
        ONE,
        uri(ONE),
        f"DATA:Image/PNG;Base64,{BODY}",
        f"data:image/x-unknown;base64,{BODY}",
        f"data:image/png;charset=utf-8;name=a.png;base64,{BODY}",
        f"data:image/png;base64,{BODY.rstrip('=')}",
        "data:image/png;base64,\n" + "\r\n".join(BODY[at : at + 64] for at in range(0, len(BODY), 64)),
    ],
)
def test_sources_that_are_taken(source: str | bytes) -> None:
    assert media_source(Media("image", source), PLACE) == ONE


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "an image as data:image/png;base64,..., or bytes, got nothing"),
        ("", "an image as data:image/png;base64,..., got ''"),
        ("https://example.com/a.png", "got 'https://example.com/a.png'"),
        ("file:///etc/passwd", "no file is opened"),
        ("/etc/passwd", "no address is fetched"),
        ("ms://file-1", "got 'ms://file-1'"),
        (BODY, "an image as data"),
        ("data:,", "an image as data"),
        (f"data:image/png,{BODY}", "an image as data"),
        (f"data:image/png;base64{BODY}", "an image as data"),
        (f"data:image/png;base64;charset=utf-8,{BODY}", "an image as data"),
        (f"data:text/html;base64,{BODY}", "an image as data"),
        (f"data:;base64,{BODY}", "an image as data"),
        ("data:image/png,%89PNG%0D%0A", "an image as data"),
        (f"data:image/png;base64,{BODY.replace('A', '%41', 1)}", "an image in base64"),
        (f"data:image/png;base64,{BODY[:-5]}é", "an image in base64"),
        ("data:image/png;base64,\ud800", "an image in base64"),
        ("data:image/png;base64,A", "an image in base64"),
        ("data:image/png;base64,AA==AA==", "an image in base64"),
        ("data:image/png;base64,_-_-", "an image in base64"),
        ("data:image/png;base64,", "an image, got no bytes"),
        (b"", "an image, got no bytes"),
        ("x" * 10**7, "an image as data"),
        (f"data:image/png{';' * 10**6};base64,{BODY}", "an image as data"),
    ],
)
def test_sources_that_are_refused(source: str | bytes | None, message: str) -> None:
    with pytest.raises(RequestError) as error:
        media_source(Media("image", source), PLACE)
    assert str(error.value).startswith(f"{PLACE}: expected ")
    assert message in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url"}, "image_url: expected an image as data:image/png;base64,..., or bytes, got nothing"),
        ({"type": "image"}, "image_url: expected an image as data"),
        ({"type": "image_url", "image_url": {}}, "image_url: expected an image as data"),
        ({"type": "image_url", "image_url": {"url": None}}, "image_url: expected an image as data"),
        ({"type": "image_url", "image_url": 3}, "image_url: expected an image as .* got int"),
        ({"type": "image_url", "image_url": {"url": ["x"]}}, "image_url: expected an image as .* got list"),
        ({"type": "image", "image": 0.5}, "image: expected an image as .* got float"),
        ({"type": "image", "image": b"GIF89a"}, "image: expected a PNG, JPEG, WebP or GIF image, got 6 bytes"),
        ({"type": "image_url", "image_url": "http://x"}, "image_url: expected an image as data"),
    ],
)
def test_an_error_names_the_part(part: dict[str, Any], message: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[1\]\." + message):
        encode_chat(small_tokenizer(), messages, images=K26)

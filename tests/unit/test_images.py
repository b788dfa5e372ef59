"""Images are scaled, padded and cut as the model's own processor does it, and stand in prompts by their content."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
import re
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.errors import ConfigError, HybridK2Error, RequestError, UnsupportedModelError
from hybrid_k2.protocol import (
    IMAGE_BASE,
    Image,
    ImageFormat,
    encode_chat,
    encode_prompt,
    image_of_token,
    image_token,
    is_image_token,
    read_image,
)
from tests.conftest import REPO
from tests.protocol_strategies import real_tokenizer, small_tokenizer

pillow = pytest.importorskip("PIL.Image", reason="Pillow decodes the images: pip install pillow")

K26 = ImageFormat()
DOCS = REPO / "docs" / "images.md"
PLACE = "messages[0].content[0].image_url"


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Return pixels [height, width, 3] that neighbouring ones do not give away."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    """Return the file of a picture, or of an image of Pillow."""
    file = io.BytesIO()
    (pillow.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


# -- sizes


@pytest.mark.parametrize(
    ("size", "resized", "tokens"),
    [
        ((2048, 1365), (2048, 1365), 3626),
        ((17, 64), (17, 64), 3),
        ((5000, 6000), (1637, 1964), 4189),
        ((1920, 1080), (1920, 1080), 2691),
        ((3840, 2160), (2392, 1345), 4214),
        ((4096, 2160), (2472, 1303), 4183),
        ((7168, 7168), (1792, 1792), 4096),
        ((10000, 20), (7168, 14), 256),
        ((1, 1), (1, 1), 1),
    ],
)
def test_sizes_of_the_models_own_processor(size: tuple[int, int], resized: tuple[int, int], tokens: int) -> None:
    assert K26.fit(*size) == resized
    width, height = resized
    assert math.ceil(width / 28) * math.ceil(height / 28) == tokens <= K26.max_tokens


def test_sizes_of_the_documentation() -> None:
    rows = re.findall(r"^\| (\d+) x (\d+) \| (?:(\d+) x (\d+) )?\| (\d+) \|$", DOCS.read_text(), re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        width, height, to_width, to_height, tokens = (int(number or 0) for number in row)
        resized = K26.fit(width, height)
        assert resized == ((to_width, to_height) if to_width else (width, height))
        assert math.ceil(resized[0] / 28) * math.ceil(resized[1] / 28) == tokens


formats = st.builds(
    ImageFormat,
    patch_size=st.integers(1, 20),
    merge=st.integers(1, 4),
    patch_limit=st.integers(1, 20_000),
    side_limit=st.integers(1, 600),
)
sides = st.integers(1, 200) | st.integers(1, 65_535)


@given(formats | st.just(K26), sides, sides)
def test_sizes_keep_the_limits(format: ImageFormat, width: int, height: int) -> None:
    side, most = format.patch_size, format.side_limit * format.patch_size
    fitted = format.fit(width, height)
    whole = max(1, width // side) * max(1, height // side)
    scale2 = min(Fraction(1), Fraction(format.patch_limit, whole), *(Fraction(most, x) ** 2 for x in (width, height)))
    for before, after in zip((width, height), fitted, strict=True):
        assert 1 <= after <= min(before, most)
        # `after` is the whole part of before * scale, but for a rounding of the scale.
        assert after == 1 or after**2 <= before**2 * scale2 * Fraction(1 + 2**-50)
        assert (after + 1) ** 2 > before**2 * scale2 * Fraction(1 - 2**-50)
    token_side = side * format.merge
    assert math.prod(-(-x // token_side) for x in fitted) <= format.max_tokens


def test_the_bound_of_tokens_is_near() -> None:
    """Sizes a little short of a whole patch, around the limit, come within 1 % of the bound."""
    chance = random.Random(1)
    largest = 0
    for _ in range(20_000):
        columns = chance.randrange(30, 60)
        width, height = 14 * columns + 13, 14 * round(16384 / columns * chance.uniform(0.98, 1.1)) + 13
        largest = max(largest, math.prod(-(-x // 28) for x in K26.fit(width, height)))
    assert K26.max_tokens == 4482
    assert 0.99 * K26.max_tokens < largest <= K26.max_tokens


# -- pixels


def test_golden_pixels() -> None:
    y, x = np.mgrid[:48, :32]
    channels = [(7 * x + 3 * y + 11) % 256, (5 * x + 13 * y + 29) % 256, (17 * x + 9 * y + 47) % 256]
    image = read_image(saved(np.stack(channels, -1).astype(np.uint8)), K26, PLACE)
    assert (image.grid, image.tokens) == ((4, 4), 4)
    patches = image.patches()
    assert patches.dtype == torch.float32
    digest = hashlib.sha256(b'{"dtype":"bfloat16","shape":[16,3,14,14]}\0')
    digest.update(patches.bfloat16().view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == "37ae1786eb941cb4b9695c9f78b71996cfdfbb34870b2269a9f2cee08d7b0c52"


@given(st.integers(1, 90), st.integers(1, 90), formats, st.integers(0, 2**32))
def test_patches_are_the_pixels(width: int, height: int, format: ImageFormat, seed: int) -> None:
    """Every pixel is found again where its patch lies, scaled; what was added is black."""
    pixels = picture(width, height, seed)
    file = pillow.fromarray(pixels)
    if format.fit(width, height) != (width, height):
        pixels = np.asarray(file.resize(format.fit(width, height), pillow.Resampling.BICUBIC))
    image = read_image(saved(file), format, PLACE)
    rows, columns = image.grid
    side = format.patch_size
    assert image.tokens == -(-pixels.shape[0] // (side * format.merge)) * -(-pixels.shape[1] // (side * format.merge))
    patches = image.patches()
    assert patches.shape == (rows * columns, 3, side, side)
    for index in random.Random(seed).sample(range(rows * columns), min(20, rows * columns)):
        top, left = index // columns * side, index % columns * side
        expected = np.zeros((side, side, 3))
        there = pixels[top : top + side, left : left + side]
        expected[: there.shape[0], : there.shape[1]] = there
        got = patches[index].permute(1, 2, 0).double().numpy()
        # three operations in fp32 on values up to 2
        np.testing.assert_allclose(got, (expected / 255 - 0.5) / 0.5, rtol=0, atol=4 * 2.0**-23)


def test_mean_and_std_are_those_of_each_channel() -> None:
    format = ImageFormat(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    patches = read_image(saved(np.full((28, 28, 3), 255, np.uint8)), format, PLACE).patches()
    for channel, value in enumerate((0.9 / 0.5, 0.8 / 0.25, 0.7 / 2.0)):
        assert patches[:, channel].numpy() == pytest.approx(value, rel=1e-6)


# -- digests and tokens


def test_a_digest_is_that_of_pixels_and_format() -> None:
    pixels = picture(28, 56)
    image = read_image(saved(pixels), K26, PLACE)
    assert image.digest == read_image(saved(pillow.fromarray(pixels), "WEBP", lossless=True), K26, PLACE).digest
    turned = Image(pixels.reshape(28, 56, 3), K26)  # the same bytes
    changed = pixels.copy()
    changed[-1, -1, -1] ^= 1
    others = [turned, Image(changed, K26), Image(pixels, ImageFormat(side_limit=511))]
    assert len({image.digest, *(other.digest for other in others)}) == 4
    assert 0 <= image.digest < 2**128


def test_pixels_cannot_be_changed() -> None:
    image = read_image(saved(picture(5, 5)), K26, PLACE)
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0, 0, 0] = 1


@given(st.integers(0, 2**128 - 1), st.integers(0, 2**16 - 1))
def test_image_tokens_hold_digest_and_row(digest: int, row: int) -> None:
    token = image_token(digest, row)
    assert image_of_token(token) == (digest, row)
    assert is_image_token(token)
    assert token >= IMAGE_BASE
    assert json.loads(json.dumps([token])) == [token]  # as the file of a prompt cache has it


def test_ids_of_the_vocabulary_are_no_image_tokens() -> None:
    assert not any(map(is_image_token, (0, 163_605, 2**31 - 1)))


# -- prompts


def test_golden_image_prompt() -> None:
    tokenizer = real_tokenizer()
    if tokenizer is None:
        pytest.skip("the K2.6 vocabulary is not at hand")
    messages = user(
        {"type": "image_url", "image_url": {"url": uri(saved(picture(32, 48)))}},
        {"type": "text", "text": "请用中文简短描述这张图片。"},
    )
    ids, images = encode_chat(tokenizer, messages, thinking=False, images=K26)
    (digest,) = images
    assert len(ids) == 26
    assert ids[6:10] == [image_token(digest, row) for row in range(4)]
    plain = [tokenizer.special["<|media_pad|>"] if is_image_token(token) else token for token in ids]
    digest_of_ids = hashlib.sha256(struct.pack("<26i", *plain)).hexdigest()
    assert digest_of_ids == "67f80d6086475aede2f1f5426cd1f0d4805cf287c954660557dcfef3449f39d8"


def parts_and_texts(chance: random.Random) -> tuple[list[Any], list[str], list[np.ndarray]]:
    """Return the parts of a message, the same with a marker for each image, and the pictures."""
    parts: list[Any] = []
    texts, pictures = [], []
    for _ in range(chance.randrange(5)):
        if chance.random() < 0.5:
            texts.append(chance.choice(["hello", "<|media_pad|>", "two\n", ""]))
            parts.append({"type": "text", "text": texts[-1]})
        else:
            pictures.append(picture(chance.randrange(1, 80), chance.randrange(1, 80), chance.randrange(4)))
            data = saved(pictures[-1])
            parts.append(
                chance.choice(
                    [
                        {"type": "image_url", "image_url": {"url": uri(data), "detail": "high"}},
                        {"type": "image_url", "image_url": uri(data)},
                        {"type": "image", "image": data},
                        {"type": "image", "image": bytearray(data)},
                        {"type": "image", "image": uri(data), "image_url": None},
                        {"type": "image", "image_url": uri(data)},
                    ]
                )
            )
            texts.append("\0")
    return parts, texts, pictures


@pytest.mark.parametrize("seed", range(20))
def test_images_of_any_message_stand_where_the_markers_are(seed: int) -> None:
    chance = random.Random(seed)
    tokenizer = small_tokenizer()
    messages, marked, pictures = [], [], []
    for role in chance.choices(["user", "system", "tool", "assistant"], k=4):
        parts, texts, found = parts_and_texts(chance)
        messages.append({"role": role, "content": parts})
        marked.append({"role": role, "content": [{"type": "text", "text": text} for text in texts]})
        pictures += found
    ids, images = encode_chat(tokenizer, messages, images=K26)
    expected, shown = iter(pictures), iter(encode_prompt(tokenizer, marked))
    special = tokenizer.special
    frame = [special["<|media_begin|>"], *tokenizer.encode("image"), special["<|media_content|>"]]
    digests = set()
    position = 0
    for token in shown:
        if token != tokenizer.encode("\0")[0]:
            assert ids[position] == token
            position += 1
            continue
        image = read_image(saved(next(expected)), K26, PLACE)
        rows = [image_token(image.digest, row) for row in range(image.tokens)]
        whole = [*frame, *rows, special["<|media_end|>"], *tokenizer.encode("\n")]
        assert ids[position : position + len(whole)] == whole
        position += len(whole)
        digests.add(image.digest)
        assert np.array_equal(images[image.digest].pixels, image.pixels)
    assert position == len(ids)
    assert images.keys() == digests


def test_without_images_it_is_the_prompt_of_the_text() -> None:
    messages = [{"role": "user", "content": "a" * 100}, {"role": "assistant", "content": "b", "partial": True}]
    for images in (K26, None):
        assert encode_chat(small_tokenizer(), messages, images=images) == (
            encode_prompt(small_tokenizer(), messages),
            {},
        )
    assert len(encode_chat(small_tokenizer(), messages, images=K26, most=10)[0]) > 10


def test_no_image_is_read_beyond_the_most_tokens() -> None:
    tokenizer = small_tokenizer()
    good = {"type": "image", "image": saved(picture(280, 280))}  # 100 tokens
    bad = {"type": "image", "image": b"no image"}
    text = {"type": "text", "text": "x" * 150}
    ids, images = encode_chat(tokenizer, user(good, good, bad, text), images=K26, most=300)
    assert len(ids) > 300
    assert len(images) == 1
    assert len(encode_chat(tokenizer, user(bad, text), images=K26, most=100)[0]) > 100
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[2\]\.image: expected a PNG"):
        encode_chat(tokenizer, user(good, good, bad), images=K26, most=300)
    whole, _ = encode_chat(tokenizer, user(good, text), images=K26)
    assert encode_chat(tokenizer, user(good, text), images=K26, most=len(whole))[0] == whole


def test_an_image_that_was_read_before_is_taken_as_it_is() -> None:
    tokenizer, data = small_tokenizer(), saved(picture(50, 60))
    image = read_image(data, K26, PLACE)
    ids, images = encode_chat(tokenizer, user({"type": "image", "image": image}), images=K26)
    assert (ids, images) == (
        encode_chat(tokenizer, user({"type": "image", "image": data}), images=K26)[0],
        {image.digest: image},
    )
    with pytest.raises(RequestError, match=r"content\[0\]\.image: expected an image in this checkpoint's format"):
        encode_chat(tokenizer, user({"type": "image", "image": image}), images=ImageFormat(patch_size=7))


def test_media_that_are_not_taken() -> None:
    image = {"type": "image_url", "image_url": {"url": uri(saved(picture(3, 3)))}}
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\]: expected text, got image\n.*text only"):
        encode_chat(small_tokenizer(), user(image), images=None)
    for images in (None, K26):
        with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\]: expected text.*, got video"):
            encode_chat(small_tokenizer(), user(video), images=images)


# -- preprocessor_config.json


def loaded(folder: Path, data: object) -> ImageFormat:
    (folder / "preprocessor_config.json").write_text(json.dumps(data))
    return ImageFormat.load(folder)


def test_the_format_of_k26(kimi_data: Path) -> None:
    assert ImageFormat.load(kimi_data) == K26


def test_the_format_is_that_of_the_file(tmp_path: Path) -> None:
    assert ImageFormat.load(tmp_path) == loaded(tmp_path, {}) == loaded(tmp_path, {"media_proc_cfg": {}}) == K26
    given = {"patch_size": 4, "merge_kernel_size": 1, "in_patch_limit": 64, "patch_limit_on_one_side": 16}
    norm = {"image_mean": [0, 0.25, -1], "image_std": [1, 2, 0.5]}
    expected = ImageFormat(4, 1, 64, 16, (0.0, 0.25, -1.0), (1.0, 2.0, 0.5))
    assert loaded(tmp_path, {"media_proc_cfg": given | norm}) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("patch_size", 0, "an integer of at least 1, got 0"),
        ("patch_size", "14", "an integer of at least 1, got '14'"),
        ("in_patch_limit", 10**6, "at most 65536, got 1000000"),
        ("merge_kernel_size", [2, 2], "an integer"),
        ("patch_limit_on_one_side", None, "an integer"),
        ("image_mean", 0.5, "a list of three numbers"),
        ("image_mean", [0.5, 0.5], "a list of three numbers"),
        ("image_std", [0.5, 0.5, 0], "a list of three numbers above 0"),
        ("image_std", [0.5, 0.5, 1e-46], "a list of three numbers above 0"),
        ("image_std", [0.5, 0.5, True], "a list of three numbers above 0"),
        ("image_std", [0.5, 0.5, 10**400], "a list of three numbers above 0"),
    ],
)
def test_nonsense_in_the_format(tmp_path: Path, name: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, {"media_proc_cfg": {name: value}})
    assert f"preprocessor_config.json: media_proc_cfg: {name}: expected {expected}" in str(error.value)


@pytest.mark.parametrize(
    ("data", "kind", "expected"),
    [
        ({"media_proc_cfg": 3}, ConfigError, "media_proc_cfg: expected an object, got 3"),
        ({"media_proc_cfg": {"fixed_output_tokens": 64}}, UnsupportedModelError, "fixed_output_tokens: expected null"),
        ({"media_proc_cfg": {"merge_kernel_size": 1, "in_patch_limit": 65536}}, ConfigError, "at most 65536 tokens"),
        ([], ConfigError, "expected a JSON object"),
    ],
)
def test_formats_that_are_not_taken(tmp_path: Path, data: object, kind: type[HybridK2Error], expected: str) -> None:
    with pytest.raises(kind, match=expected):
        loaded(tmp_path, data)

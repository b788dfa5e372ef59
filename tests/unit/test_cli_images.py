"""Images of a chat: what is read from files, what a message holds of it, and what a saved conversation may hold."""

from __future__ import annotations

import base64
import io
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid_k2.cli.chat.commands import completions
from hybrid_k2.cli.chat.conversation import Conversation, load_conversation, save_conversation
from hybrid_k2.cli.chat.files import MAX_BYTES, path_completions
from hybrid_k2.cli.chat.images import attach_image, content_of, is_content
from hybrid_k2.errors import ConfigError
from hybrid_k2.placement.sizes import format_bytes

BEGINNINGS = {
    "png": b"\x89PNG\r\n\x1a\n",
    "jpeg": b"\xff\xd8\xff\xe0",
    "gif": b"GIF89a",
    "webp": b"RIFF\x10\x00\x00\x00WEBP",
}


@pytest.mark.parametrize("kind", BEGINNINGS)
@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_the_type_is_told_by_the_first_bytes(tmp_path: Path, kind: str, size: int) -> None:
    data = BEGINNINGS[kind] + random.Random(size).randbytes(size)
    path = tmp_path / "my photo.txt"
    path.write_bytes(data)
    image = attach_image(path)
    assert str(image) == f"my photo.txt, {format_bytes(len(data))}"
    head, _, encoded = image.part()["image_url"]["url"].partition(",")
    assert head == f"data:image/{kind};base64"
    assert base64.b64decode(encoded, validate=True) == data


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_a_photo_is_turned_as_it_is_shown(tmp_path: Path, orientation: int | None) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")
    stored = np.zeros((64, 48, 3), np.uint8)
    stored[:32, :24] = 255, 0, 0  # above left red, above right green, below left blue, below right black
    stored[:32, 24:], stored[32:, :24] = (0, 255, 0), (0, 0, 255)
    exif = pillow.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    pillow.fromarray(stored).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    data = (tmp_path / "photo.jpg").read_bytes()
    image = attach_image(tmp_path / "photo.jpg")
    # What Exif says of rows and columns of the picture: which way they run in what is stored.
    shown = {2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}
    shown |= {5: stored.swapaxes(0, 1), 6: stored[::-1].swapaxes(0, 1), 8: stored[:, ::-1].swapaxes(0, 1)}
    shown[7] = stored[::-1, ::-1].swapaxes(0, 1)
    if orientation in (None, 1):
        assert image.data == data
        return
    with pillow.open(io.BytesIO(image.data)) as turned:
        pixels = np.asarray(turned).astype(int)
        assert turned.getexif().get(0x0112, 1) == 1
    expected = shown[orientation]
    assert pixels.shape == expected.shape
    rows, columns = pixels.shape[0] // 4, pixels.shape[1] // 4
    for y, x in ((rows, columns), (rows, 3 * columns), (3 * rows, columns), (3 * rows, 3 * columns)):
        assert abs(pixels[y, x] - expected[y, x]).max() < 64, "JPEG changes colours a little"


def test_a_damaged_photo_is_left_to_who_reads_it(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")
    exif = pillow.Exif()
    exif[0x0112] = 6
    pillow.fromarray(np.zeros((64, 48, 3), np.uint8)).save(tmp_path / "photo.jpg", exif=exif)
    data = (tmp_path / "photo.jpg").read_bytes()[:-300]
    (tmp_path / "photo.jpg").write_bytes(data)
    assert attach_image(tmp_path / "photo.jpg").data == data


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (b"", "an empty one"),
        (b"%PDF-1.7 and so on", r"one that begins with b'%PDF-1\.7 and'"),
        (b"\x89PNG", r"one that begins with b'.x89PNG'"),
        (b"RIFF\x10\x00\x00\x00WAVEfmt ", "one that begins with b'RIFF"),
        (b"<svg/>", "one that begins with b'<svg/>'"),
    ],
)
def test_what_is_no_image(tmp_path: Path, data: bytes, got: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"x\.png: expected a PNG, JPEG, WebP or GIF file, got {got}"):
        attach_image(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.png: cannot be read: No such file"):
        attach_image(tmp_path / "none.png")
    with pytest.raises(ConfigError, match="expected a regular file, got a folder"):
        attach_image(tmp_path)
    large = tmp_path / "large.png"
    large.write_bytes(BEGINNINGS["png"])
    os.truncate(large, MAX_BYTES + 1)  # a hole: it takes no room on the disk
    with pytest.raises(ConfigError, match=r"large\.png: expected at most 64 MiB"):
        attach_image(large)


def test_a_message_with_images_is_saved_and_loaded(tmp_path: Path) -> None:
    paths = [tmp_path / f"{kind}.img" for kind in BEGINNINGS]
    for path, data in zip(paths, BEGINNINGS.values(), strict=True):
        path.write_bytes(data)
    images = [attach_image(path) for path in paths]
    assert content_of("what?", []) == "what?"
    content = content_of("what?", images)
    assert [part["type"] for part in content if isinstance(part, dict)] == ["image_url"] * 4 + ["text"]
    conversation = Conversation(None, [{"role": "user", "content": content}])
    assert conversation.prompt() == conversation.messages
    path = tmp_path / "c.json"
    save_conversation(path, conversation, model="k2", thinking=True)
    assert load_conversation(path)[0] == conversation


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.parametrize(
    "content",
    [
        3,
        [3],
        [{"type": "text"}],
        [{"type": "text", "text": 1}],
        [{"type": "text", "text": "a", "more": 1}],
        [{"type": ["text"], "text": "a"}],
        [{"type": "image_url", "image_url": "data:image/png;base64,AA=="}],
        [{"type": "image_url", "image_url": {"url": "http://x.y/z.png"}}],
        [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}],
        [IMAGE, {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA=="}}],
    ],
)
def test_what_no_saved_message_holds(content: Any) -> None:
    assert not is_content(content)
    assert is_content([IMAGE, {"type": "text", "text": "a"}])


def test_a_conversation_that_could_not_be_loaded_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_k2.cli.chat.conversation.MAX_BYTES", 2**20)
    conversation = Conversation(None, [{"role": "user", "content": "x" * 2**20}])
    with pytest.raises(ConfigError, match="at most 1 MiB with its images"):
        save_conversation(tmp_path / "c.json", conversation, model="k2", thinking=True)
    assert list(tmp_path.iterdir()) == []


def test_paths_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos of me").mkdir()
    for name in ("pho.png", "other.png", ".hidden", "photos of me/a cat.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_completions("pho") == ["pho.png", "photos of me/"]
    assert path_completions("") == ["other.png", "pho.png", "photos of me/"]
    assert path_completions(".h") == [".hidden"]
    assert path_completions("photos of me/") == ["photos of me/a cat.png"]
    assert path_completions("~/o") == ["~/other.png"]
    assert path_completions(f"{tmp_path}/oth") == [f"{tmp_path}/other.png"]
    for nothing in ("zzz", "none/x", "pho.png/x", "a\0b/c"):
        assert path_completions(nothing) == []
    assert completions("/image photos of me/a") == ["/image photos of me/a cat.png"]
    assert completions("/load oth") == ["/load other.png"]
    assert completions("/think o") == completions("look at oth") == completions("/nothing oth") == []

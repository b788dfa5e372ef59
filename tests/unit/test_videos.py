"""Of a video the right frames are seen, as clips with their times, and they stand in prompts where the video is."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.errors import RequestError
from hybrid_k2.protocol import Clip, Image, ImageFormat, Video, encode_chat, image_token, render
from hybrid_k2.protocol.messages import read_messages
from hybrid_k2.protocol.videos import choose_frames
from tests.protocol_strategies import small_tokenizer

K26 = ImageFormat()


def noise(*shape: int, seed: int = 0) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8), K26)


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


# -- frames and times


def test_frames_and_times_of_the_reference() -> None:
    """300 frames at 30 a second: 189 / 30 is a little less than 6.3."""
    chosen = choose_frames(300, 30.0, 2.0)
    assert len(chosen) == 20
    assert (chosen[0], chosen[-1]) == (0, 299)
    times = [Clip(first / 30.0, noise(28, 28)).timestamp for first in chosen[::4]]
    assert times == ["00:00:00.000", "00:00:02.100", "00:00:04.200", "00:00:06.299", "00:00:08.400"]


@pytest.mark.parametrize(
    ("count", "rate", "expected"),
    [
        (1, 30.0, [0]),
        (2, 30.0, [0]),
        (7, 30.0, [0]),  # 0.47: none, but one at least
        (22, 30.0, [0]),  # 1.47
        (23, 30.0, [0, 22]),
        (5, 2.0, [0, 1, 2, 3, 4]),
        (5, 0.1, [0, 1, 2, 3, 4]),  # slower than they are wanted: all
        (5, 4.0, [0, 4]),  # 2.5: half to even
        (7, 4.0, [0, 2, 4, 6]),  # 3.5
        (6, 4.0, [0, 2, 5]),  # 2.5 is between two frames: the even one
        (4, 1e9, [0]),
    ],
)
def test_chosen_frames(count: int, rate: float, expected: list[int]) -> None:
    assert choose_frames(count, rate, 2.0) == expected


@given(st.integers(1, 5000), st.floats(0.01, 1000), st.floats(0.1, 60))
def test_frames_lie_evenly(count: int, rate: float, most_rate: float) -> None:
    chosen = choose_frames(count, rate, most_rate)
    wanted = max(round(count * min(most_rate, rate) / rate), 1)
    assert len(chosen) == wanted <= count
    assert len(set(chosen)) == wanted
    for number, index in enumerate(chosen):
        exact = Fraction(number * (count - 1), max(wanted - 1, 1))
        assert abs(index - exact) <= Fraction(1, 2) + Fraction(1, 10**9)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "00:00:00.000"),
        (0.0009, "00:00:00.000"),
        (59.9999, "00:00:59.999"),
        (60.0, "00:01:00.000"),
        (3725.5, "01:02:05.500"),
        (86399.5, "23:59:59.500"),
        (86400.25, "00:00:00.250"),  # a clock
    ],
)
def test_timestamps(seconds: float, expected: str) -> None:
    assert Clip(seconds, noise(28, 28)).timestamp == expected


# -- sizes and patches


@pytest.mark.parametrize(
    ("size", "resized", "tokens"),
    [((1920, 1080), (1196, 672), 1032), ((1280, 720), (1202, 676), 1075), ((640, 360), (640, 360), 299)],
)
def test_sizes_of_frames(size: tuple[int, int], resized: tuple[int, int], tokens: int) -> None:
    assert K26.fit_frame(*size) == resized
    assert math.prod(-(-side // 28) for side in resized) == tokens <= K26.max_frame_tokens


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_clip_has_the_patches_of_its_frames(frames: int) -> None:
    clip = noise(frames, 28, 56)
    assert (clip.frames, clip.grid, clip.tokens) == (frames, (2, 4), 2)
    alone = [Image(pixels, K26) for pixels in clip.pixels]
    assert torch.equal(clip.patches(), torch.cat([image.patches() for image in alone]))
    assert len({clip.digest, *(image.digest for image in alone)}) == frames + 1


def test_a_clip_is_known_by_its_frames_and_their_order() -> None:
    clip = noise(2, 28, 28)
    assert clip.digest == Image(clip.pixels.copy(), K26).digest
    assert clip.digest != Image(clip.pixels[::-1], K26).digest
    assert clip.digest != Image(clip.pixels.reshape(56, 28, 3), K26).digest  # the same bytes


# -- prompts


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_video_stands_where_its_marker_is(role: str) -> None:
    """The text is that of the checkpoint's template, with the clips in place of the marker."""
    tokenizer = small_tokenizer()
    video = Video((Clip(0.0, noise(4, 28, 56)), Clip(2.1, noise(1, 28, 56, seed=1))))
    picture = noise(28, 28, seed=2)
    parts = [{"type": "video", "video": video}, {"type": "image", "image": picture}, {"type": "text", "text": "b"}]
    messages = [{"role": role, "content": [{"type": "text", "text": "a "}, *parts]}]
    ids, images = encode_chat(tokenizer, messages, images=K26)
    marked = [{"role": role, "content": [{"type": "text", "text": "a "}, {"type": "video_url"}, *parts[1:]]}]
    clip = "{}<|media_begin|>video<|media_content|><|media_pad|><|media_end|>"
    clips = clip.format("00:00:00.000") + clip.format("00:00:02.100")
    text = render(marked).replace("<|kimi_k25_video_placeholder|>", clips)
    assert "a 00:00:00.000<|media_begin|>" in text
    assert "<|media_end|>\n<|media_begin|>image" in text
    expected: list[int] = []
    seen = iter([clip.image for clip in video.clips] + [picture])
    for token in tokenizer.encode_parts(control_and_text(text)):
        if token == tokenizer.special["<|media_pad|>"]:
            image = next(seen)
            expected += [image_token(image.digest, row) for row in range(image.tokens)]
        else:
            expected.append(token)
    assert ids == expected
    assert images == {image.digest: image for image in (*(clip.image for clip in video.clips), picture)}


def control_and_text(text: str) -> list[tuple[str, bool]]:
    """Divide a text at what looks like a control token, with whether it does."""
    parts: list[tuple[str, bool]] = []
    while "<|" in text:
        before, _, text = text.partition("<|")
        name, _, text = text.partition("|>")
        parts += [(before, False), (f"<|{name}|>", True)]
    think, _, rest = text.partition("<think>")  # the prompt ends with it
    return [part for part in (*parts, (think, False), ("<think>", True), (rest, False)) if part[0]]


def test_videos_beyond_the_most_tokens_are_not_read() -> None:
    video = Video(tuple(Clip(float(at), noise(28, 28, seed=at)) for at in range(50)))
    bad = {"type": "video", "video": b"no video"}
    ids, _ = encode_chat(small_tokenizer(), user({"type": "video", "video": video}, bad), images=K26, most=40)
    assert len(ids) > 40
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[1\]\.video: expected"):
        encode_chat(small_tokenizer(), user({"type": "video", "video": video}, bad), images=K26, most=60)


def test_a_video_of_another_format_is_refused() -> None:
    video = Video((Clip(0.0, Image(np.zeros((1, 28, 28, 3), np.uint8), ImageFormat(side_limit=100))),))
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\].*this checkpoint's format"):
        encode_chat(small_tokenizer(), user({"type": "video", "video": video}), images=K26)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video_url"}, "video_url: expected a video as data:video/mp4;base64,..., or bytes, got nothing"),
        ({"type": "video_url", "video_url": {"url": "https://x/a.mp4"}}, "video_url: .*got 'https:.*\n.*no address"),
        ({"type": "video_url", "video_url": "data:image/png;base64,AA=="}, "video_url: expected a video as data"),
        ({"type": "video", "video": "/etc/passwd"}, "video: .*\n.*no file is opened"),
        ({"type": "video", "video": b""}, "video: expected a video, got no bytes"),
        ({"type": "video", "video": 3}, "video: expected a video as .*got int"),
    ],
)
def test_an_error_names_the_part(part: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[1\]\." + message):
        encode_chat(small_tokenizer(), user({"type": "text", "text": "x"}, part), images=K26)


def test_the_source_of_a_part() -> None:
    parts = [
        {"type": "video_url", "video_url": {"url": "u"}},
        {"type": "video_url", "video_url": "u"},
        {"type": "video", "video": b"u"},
        {"type": "video", "video": b"u", "video_url": None},
    ]
    media = read_messages(user(*parts))[0].content
    assert [(one.kind, one.source, one.key) for one in media if not isinstance(one, str)] == [
        ("video", "u", "video_url"),
        ("video", "u", "video_url"),
        ("video", b"u", "video"),
        ("video", b"u", "video"),
    ]

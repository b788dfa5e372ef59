"""Video files of strangers: the right frames of each format, or one error that names the place."""

from __future__ import annotations

import io
import random
import socket
import sys
from contextlib import nullcontext, suppress
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hybrid_k2.errors import MemoryBudgetError, RequestError
from hybrid_k2.protocol import ImageFormat, Video, encode_chat, is_image_token, read_video, video_files
from hybrid_k2.protocol.video_files import VideoFile
from hybrid_k2.protocol.videos import choose_frames
from tests.protocol_strategies import small_tokenizer
from tests.videos import av, coloured, index_of, video

K26 = ImageFormat()
PLACE = "messages[0].content[0].video_url"
KINDS = [
    ("mp4", "libx264"),
    ("mp4", "mpeg4"),
    ("mov", "mjpeg"),
    ("3gp", "mpeg4"),
    ("avi", "mpeg4"),
    ("flv", "flv"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("mpeg", "mpeg1video"),
    ("mpeg", "mpeg2video"),
    ("mpeg1video", "mpeg1video"),
    ("asf", "wmv2"),
    ("asf", "msmpeg4"),
]


def seen(found: Video, width: int = 64, height: int = 48) -> list[list[int]]:
    """Return which of the coloured frames are in each clip."""
    return [[index_of(pixels[:height, :width]) for pixels in clip.image.pixels] for clip in found.clips]


def refused(data: bytes) -> str:
    with pytest.raises(RequestError) as error:
        read_video(data, K26, PLACE)
    assert str(error.value).startswith(f"{PLACE}: expected ")
    assert len(str(error.value)) < 500
    return str(error.value)


# -- frames


@pytest.mark.parametrize(("kind", "codec"), KINDS)
def test_frames_of_every_format(kind: str, codec: str) -> None:
    found = read_video(video(coloured(75), kind, codec, rate=25), K26, PLACE)
    assert seen(found) == [[0, 15, 30, 44], [59, 74]]
    assert [clip.timestamp for clip in found.clips] == ["00:00:00.000", "00:00:02.359"]
    assert [clip.image.pixels.shape for clip in found.clips] == [(4, 56, 84, 3), (2, 56, 84, 3)]
    assert not any(clip.image.pixels[:, 48:].any() or clip.image.pixels[:, :, 64:].any() for clip in found.clips)
    assert found.tokens == 12


@pytest.mark.parametrize("frames", [1, 2, 23, 61, 120])
@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(15)])
def test_frames_of_any_number_and_rate(frames: int, rate: Fraction) -> None:
    found = read_video(video(coloured(frames), rate=rate), K26, PLACE)
    chosen = choose_frames(frames, float(rate), 2.0)
    assert seen(found) == [chosen[first : first + 4] for first in range(0, len(chosen), 4)]
    assert [clip.seconds for clip in found.clips] == [first / float(rate) for first in chosen[::4]]


def test_frames_come_in_the_order_in_which_they_are_shown() -> None:
    """Where frames are predicted from later ones, a file has them in another order."""
    found = read_video(video(coloured(60), "mp4", "libx264", rate=2, options={"bf": "3"}), K26, PLACE)
    assert seen(found) == [[first, first + 1, first + 2, first + 3] for first in range(0, 60, 4)]


def test_no_frame_is_lost_where_a_stream_hides_its_order() -> None:
    """H.264 may leave out how many frames are between one and what it is predicted from."""
    data = video(coloured(60), "avi", "libx264", rate=25, options={"bf": "3"})
    start = data.index(b"\0\0\1\x67") + 4  # the stream's parameters, which each key frame repeats
    old = data[start : data.index(b"\0\0\1", start)]
    new = without_usability(old)
    assert len(new) < len(old)
    found = read_video(data.replace(old, new.ljust(len(old), b"\0")), ImageFormat(frame_rate=25.0), PLACE)
    assert [index for clip in seen(found) for index in clip] == list(range(60))


def without_usability(parameters: bytes) -> bytes:
    """Cut the usability information off the parameters of an H.264 stream as x264 writes them (High profile)."""
    bits = "".join(f"{byte:08b}" for byte in parameters.replace(b"\0\0\3", b"\0\0"))
    at = 24  # behind profile, flags and level

    def number() -> int:
        nonlocal at
        length = bits.index("1", at) - at
        at += 2 * length + 1
        return int(bits[at - length - 1 : at], 2) - 1

    for _ in range(4):  # id, sampling, depths
        number()
    at += 2  # no bypass, no matrices
    number()
    if number() == 0:  # how pictures are numbered
        number()
    number()
    at += 1
    number(), number()  # width and height
    at += 2 if bits[at] == "1" else 3  # whole frames; how vectors are inferred
    at += 1
    if bits[at - 1] == "1":  # cropped
        number(), number(), number(), number()
    assert bits[at] == "1", "expected usability information"
    end = bits[:at] + "01"
    return int(end + "0" * (-len(end) % 8), 2).to_bytes(-(-len(end) // 8), "big")


def test_a_variable_rate_counts_as_its_average() -> None:
    times = [0, 1, 2, 3, 10, 11, 12, 30, 31, 40, 50, 59]  # the last one is as long as the others: 60 of 30 a second
    found = read_video(video(coloured(12), "mp4", times=times), K26, PLACE)
    assert seen(found) == [[0, 4, 7, 11]]


def test_the_format_says_how_frames_are_chosen() -> None:
    format = ImageFormat(frame_patch_limit=4, frame_rate=10.0, clip_frames=3)
    found = read_video(video(coloured(30)), format, PLACE)
    assert seen(found, 36, 27) == [[0, 3, 6], [10, 13, 16], [19, 23, 26], [29]]
    assert found.clips[0].image.pixels.shape == (3, 28, 56, 3)  # 4 x 3 patches, of which a third may be: 36 x 27


def test_frames_of_a_clip_get_the_size_of_its_first_one() -> None:
    data = video(coloured(8), "mpeg1video", "mpeg1video", rate=25) + video(
        coloured(40, 96, 64), "mpeg1video", "mpeg1video", rate=25
    )
    found = read_video(data, ImageFormat(frame_rate=25.0), PLACE)
    shapes = [clip.image.pixels.shape for clip in found.clips]
    assert shapes[0] == (4, 56, 84, 3)
    assert shapes[-1][1:] == (84, 112, 3)
    assert set(shapes) <= {(n, *size, 3) for n in range(1, 5) for size in ((56, 84), (84, 112))}


@pytest.mark.parametrize("wrong", [20, 47, 100])
def test_the_count_is_that_of_the_frames(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file has other numbers of packets than of frames, frames are chosen among those that there are."""
    data = video(coloured(48), rate=24)
    expected = read_video(data, K26, PLACE)
    monkeypatch.setattr(VideoFile, "measure", lambda self: (wrong, 24.0))
    found = read_video(data, K26, PLACE)
    assert seen(found) == seen(expected) == [[0, 16, 31, 47]]


def test_a_rotation_is_not_applied() -> None:
    """As the model's own processor does. A file asks for it with a matrix in the head of its track."""
    frames = coloured(1, 64, 32)
    data = video(frames, "mp4")
    one, whole = (1 << 16).to_bytes(4, "big"), (1 << 30).to_bytes(4, "big")
    zero = bytes(4)
    upright = one + zero * 3 + one + zero * 3 + whole
    turned = zero + one + zero + (-1 << 16).to_bytes(4, "big", signed=True) + zero * 4 + whole
    assert data.count(upright) == 2  # of the movie, and of its track
    head, _, tail = data.rpartition(upright)
    data = head + turned + tail
    with av.open(io.BytesIO(data)) as container:
        assert next(container.decode(video=0)).rotation in (90, -90)
    (clip,) = read_video(data, K26, PLACE).clips
    assert clip.image.pixels.shape == (1, 56, 84, 3)


def test_reading_stops_beyond_the_most_tokens() -> None:
    data = video(coloured(60), rate=2)  # 15 clips of 6 tokens
    assert len(read_video(data, K26, PLACE, most=90).clips) == 15
    assert len(read_video(data, K26, PLACE, most=20).clips) == 4
    assert len(read_video(data, K26, PLACE, most=0).clips) == 1


def test_pixels_cannot_be_changed() -> None:
    (clip,) = read_video(video(coloured(1)), K26, PLACE).clips
    with pytest.raises(ValueError, match="read-only"):
        clip.image.pixels[0, 0, 0, 0] = 1


def test_a_video_in_a_prompt() -> None:
    data = video(coloured(75), rate=25)
    messages = [{"role": "user", "content": [{"type": "video", "video": data}, {"type": "text", "text": "?"}]}]
    ids, images = encode_chat(small_tokenizer(), messages, images=K26)
    expected = read_video(data, K26, PLACE)
    assert images.keys() == {clip.image.digest for clip in expected.clips}
    assert sum(map(is_image_token, ids)) == expected.tokens == 12
    again = [{"role": "user", "content": [{"type": "video", "video": expected}, {"type": "text", "text": "?"}]}]
    assert encode_chat(small_tokenizer(), again, images=K26)[0] == ids


# -- files that are refused


@pytest.mark.parametrize("data", [b"x", b"\0" * 5000, b"GIF89a" + b"\0" * 100, b"RIFF\0\0\0\0AVI "])
def test_what_is_no_video(data: bytes) -> None:
    assert "cannot be read as one" in refused(data)


def test_playlists_and_descriptions_are_no_videos() -> None:
    """Nothing is opened for them: no file, no connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        target = f"http://127.0.0.1:{port}/x.mp4"
        head = '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
        for text in (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
            f"ffconcat version 1.0\nfile {target}\n",
            "ffconcat version 1.0\nfile /etc/passwd\n",
            f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
            "a=rtpmap:96 H264/90000\n",
            f"{head}<Period><AdaptationSet><Representation><BaseURL>{target}</BaseURL></Representation>"
            "</AdaptationSet></Period></MPD>",
            f"[Reference]\nRef1={target}\n",
        ):
            assert "cannot be read as one" in refused(text.encode())
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(("kind", "codec"), [("matroska", "ffv1"), ("mov", "png"), ("avi", "rawvideo")])
def test_other_codecs(kind: str, codec: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24" if codec == "png" else "yuv420p"
        for pixels in coloured(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")))
        out.mux(stream.encode())
    assert "expected a codec out of h264, hevc, " in refused(file.getvalue())


@pytest.mark.parametrize("kind", ["gif", "mpegts", "ogg", "nut"])
def test_other_containers(kind: str) -> None:
    file = io.BytesIO()
    codec = {"gif": "gif", "ogg": "libvpx"}.get(kind, "mpeg2video")
    with av.open(file, "w", format=kind) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8" if kind == "gif" else "yuv420p"
        for pixels in coloured(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")))
        out.mux(stream.encode())
    assert "cannot be read as one" in refused(file.getvalue())


def test_sound_alone() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert "a video, got a file without one" in refused(file.getvalue())


@pytest.mark.parametrize("kind", ["avi", "mp4", "matroska"])
def test_no_frames(kind: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    refused(file.getvalue())


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "mpeg4"), ("mpeg", "mpeg2video"), ("avi", "mjpeg")])
def test_frames_that_are_too_large(kind: str, codec: str) -> None:
    assert "9437184" in refused(video(coloured(1, 4080, 2336), kind, codec))


def test_frames_that_grow_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_files, "MAX_PIXELS", 64 * 48)
    small, large = (video(coloured(9, *size), "mpeg1video", "mpeg1video", rate=25) for size in ((64, 48), (80, 64)))
    assert read_video(small, K26, PLACE).clips
    assert "frames of at most 3072 pixels, got 80 x 64" in refused(small + large)


def test_too_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_files, "MAX_FRAMES", 10)
    assert read_video(video(coloured(10)), K26, PLACE).clips
    assert "at most 10 frames, got more" in refused(video(coloured(11)))


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second whenever it is looked at: the packets are 20 and an empty one, read twice."""
    data = video(coloured(20))
    clock = iter(range(10**6))
    monkeypatch.setattr(video_files, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(video_files, "MAX_SECONDS", 50.0)
    assert read_video(data, K26, PLACE).clips
    monkeypatch.setattr(video_files, "MAX_SECONDS", 30.0)
    assert "a video that is read in 30 s" in refused(data)
    monkeypatch.setattr(video_files, "MAX_SECONDS", 50.0)
    assert read_video(data, K26, PLACE).clips, "the next one has its own time"


@pytest.mark.parametrize(
    ("rate", "times", "expected"),
    [
        (Fraction(25), [None, None], (2, 25.0)),
        (Fraction(25), [0, 100], (2, 25.0)),
        (None, [300, 0, 100], (3, 2 / 0.3)),  # in thousandths
        (Fraction(0), [None, 0, 500], (3, 4.0)),
        (None, [7], (1, 1.0)),  # whatever: it is the first one
    ],
)
def test_the_rate_of_frames(
    rate: Fraction | None, times: list[int | None], expected: tuple[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file says; where it says nothing, what its times give."""
    monkeypatch.setattr(VideoFile, "_opened", opened_as(rate))
    monkeypatch.setattr(VideoFile, "_packets", lambda *_: (SimpleNamespace(pts=pts) for pts in times))
    with VideoFile(b"", PLACE) as file:
        assert file.measure() == pytest.approx(expected)


@pytest.mark.parametrize("times", [[None, None], [5, 5]])
def test_a_file_that_says_nothing_of_time(times: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideoFile, "_opened", opened_as(None))
    monkeypatch.setattr(VideoFile, "_packets", lambda *_: (SimpleNamespace(pts=pts) for pts in times))
    assert "tells when its frames are shown, got no times" in refused(b"")


def opened_as(rate: Fraction | None) -> Any:
    stream = SimpleNamespace(average_rate=rate, time_base=Fraction(1, 1000))
    return lambda self: nullcontext((None, stream))


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("mov", "mjpeg")])
def test_files_cut_short(kind: str, codec: str) -> None:
    data = video(coloured(40), kind, codec)
    for eighths in range(8):
        refused(data[: len(data) * eighths // 8 or 20])


@pytest.mark.parametrize(("kind", "codec"), KINDS)
def test_damaged_files_are_read_or_refused(kind: str, codec: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever comes of it, it is a video or one error, and nothing is said beside it."""
    data = video(coloured(30), kind, codec)
    chance = random.Random(f"{kind} {codec}")
    capfd.readouterr()
    for _ in range(12):
        bent = bytearray(data[: chance.randrange(1, len(data))] if chance.random() < 0.4 else data)
        for _ in range(chance.randrange(1, 20)):
            bent[chance.randrange(len(bent))] = chance.randrange(256)
        with suppress(RequestError):
            assert read_video(bytes(bent), K26, PLACE, most=1000).clips
    assert capfd.readouterr() == ("", "")


def test_memory_that_runs_out_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("PIL.Image.frombuffer", none_left)
    monkeypatch.setattr("PIL.Image.frombytes", none_left)
    with pytest.raises(MemoryBudgetError, match="memory to decode a video, got none left"):
        read_video(video(coloured(1)), K26, PLACE)


@pytest.mark.parametrize("missing", ["av", "PIL"])
def test_without_the_packages(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(coloured(1))
    monkeypatch.setitem(sys.modules, missing, None)
    message = refused(data)
    assert f"got no {missing}" in message
    assert message.endswith("hint: pip install --upgrade av pillow")


def test_with_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(coloured(1))
    monkeypatch.setattr(av, "__version__", "17.0.1")
    assert "expected PyAV 17.1 or newer and Pillow to read video with, got PyAV 17.0.1" in refused(data)
    monkeypatch.setattr(av, "__version__", "17.1.0")
    assert read_video(data, K26, PLACE).clips

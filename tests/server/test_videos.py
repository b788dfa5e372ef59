"""Videos in requests: where a server reads them, the model sees the frames; elsewhere they are refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from hybrid_k2.protocol import ImageFormat, Video, read_video
from hybrid_k2.server import media as server_media
from hybrid_k2.server.options import Limits
from hybrid_k2.server.request_log import JsonLines
from tests.generators import write_checkpoint
from tests.pictures import coded
from tests.server.conftest import Client, run
from tests.server.image_requests import ESTIMATE, chat, image_url, post_and_leave, text
from tests.server.processes import serving
from tests.server.scripted import ScriptedService
from tests.videos import coloured, video

CHAT = "/v1/chat/completions"
pytestmark = pytest.mark.usefixtures("seeing")

PLACE = "messages[0].content[0].video_url.url"
FILE = video(coloured(75), rate=25)
EXPECTED = read_video(FILE, ImageFormat(), "video")


def video_url(url: Any = None, **more: Any) -> dict[str, Any]:
    url = f"data:video/mp4;base64,{coded(FILE)}" if url is None else url
    return {"type": "video_url", "video_url": {"url": url, **more}}


@pytest.fixture
def client(make_client: Callable[..., Client]) -> Client:
    return make_client(limits=Limits(videos=2))


def check_video(found: Any) -> None:
    assert isinstance(found, Video)
    assert [clip.image.digest for clip in found.clips] == [clip.image.digest for clip in EXPECTED.clips]
    assert [clip.timestamp for clip in found.clips] == ["00:00:00.000", "00:00:02.359"]


def upload(client: Client, content: bytes = FILE, purpose: str = "video", **more: Any) -> httpx.Response:
    return client.post("/v1/files", files={"file": ("clip.mp4", content)}, data={"purpose": purpose}, **more)


# Where videos are read


@pytest.mark.parametrize(
    "part",
    [
        video_url(),
        {"type": "video_url", "video_url": f"data:video/x-unknown;base64,{coded(FILE)}"},
        {"type": "video", "video": f"data:video/mp4;base64,{coded(FILE)}", "cache_control": {"type": "ephemeral"}},
    ],
)
def test_a_chat_with_a_video(client: Client, service: ScriptedService, part: dict[str, Any]) -> None:
    for streamed in (False, True):
        reply = client.post(CHAT, chat(text("Look: "), part, image_url(), text("What happens?"), stream=streamed))
        assert reply.status_code == 200, reply.text
        look, found, _, question = service.requests[-1].messages[0]["content"]
        assert (look["text"], question["text"]) == ("Look: ", "What happens?")
        check_video(found["video"])


def test_its_tokens_are_counted(client: Client) -> None:
    def count(*parts: Any) -> int:
        answer = client.post(ESTIMATE, chat(*parts))
        assert answer.status_code == 200, answer.text
        return int(answer.json()["data"]["total_tokens"])

    first, second = count(video_url()), count(video_url(), video_url())
    assert second - first == first - count(text("\n")) + 1 > EXPECTED.tokens == 12


def test_a_file_is_a_video(client: Client, service: ScriptedService) -> None:
    created = upload(client)
    assert created.status_code == 200, created.text
    assert (created.json()["purpose"], created.json()["bytes"]) == ("video", len(FILE))
    url = f"ms://{created.json()['id']}"
    assert client.post(CHAT, chat(video_url(url))).status_code == 200
    check_video(service.requests[-1].messages[0]["content"][0]["video"])
    refused = client.post(CHAT, chat(image_url(url))).json()["error"]
    assert "expected a file of the purpose image or vision, got video" in refused["message"]
    assert client.get(f"/v1/files/{created.json()['id']}/content").content == FILE


def test_files_that_are_no_videos(client: Client) -> None:
    picture = upload(client, b"no video")
    assert (picture.status_code, picture.json()["error"]["param"]) == (400, "file")
    stored = upload(client, b"a text", "file-extract").json()["id"]
    refused = client.post(CHAT, chat(video_url(f"ms://{stored}"))).json()["error"]
    assert refused["message"] == f"{PLACE}: expected a file of the purpose video, got file-extract"
    missing = client.post(CHAT, chat(video_url("ms://file-1"))).json()["error"]
    assert missing["message"] == f"{PLACE}: expected the id of a file, got 'file-1'"


@pytest.mark.parametrize("path", ["/v1/models/k2", "/v1/models"])
@pytest.mark.parametrize(("videos", "sees"), [(2, True), (0, True), (2, False)])
def test_models_say_so(
    make_client: Callable[..., Client], service: ScriptedService, path: str, videos: int, sees: bool
) -> None:
    service.images = ImageFormat() if sees else None
    model = make_client(limits=Limits(videos=videos)).get(path).json()
    model = model["data"][0] if "data" in model else model
    assert (model["supports_image_in"], model["supports_video_in"]) == (sees, sees and videos > 0)


# What is refused


@pytest.mark.parametrize(
    ("part", "place", "words"),
    [
        (video_url("https://example.com/a.mp4"), PLACE, "opens no connection"),
        (video_url("/etc/passwd"), PLACE, "opens no connection"),
        (video_url(5), PLACE, "data:video/...;base64,"),
        (video_url("data:image/png;base64,AAAA"), PLACE, "a video as data:video/mp4;base64,..."),
        (video_url("data:video/mp4;base64,AAAA"), PLACE, "cannot be read as one"),
        (video_url("data:video/mp4;base64,"), PLACE, "a video, got no bytes"),
        (video_url(detail="low"), "messages[0].content[0].video_url.detail", "a part of type video_url"),
        ({"type": "video_url"}, "messages[0].content[0].video_url", "data:video/"),
        ({"type": "video_url", "video_url": "x", "text": "y"}, "messages[0].content[0].text", ""),
        ({"type": "input_video"}, "messages[0].content[0].type", "text, image_url or video_url"),
    ],
)
def test_what_is_no_video_is_named(
    client: Client, service: ScriptedService, part: dict[str, Any], place: str, words: str
) -> None:
    refused = client.post(CHAT, chat(part))
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, place)
    assert words in error["message"]
    assert len(error["message"]) < 500
    assert not service.requests


def test_a_server_that_reads_no_video_says_so(make_client: Callable[..., Client], service: ScriptedService) -> None:
    client = make_client()
    for part in (video_url(), {"type": "video", "video": "x"}):
        for path in (CHAT, ESTIMATE):
            error = client.post(path, chat(part)).json()["error"]
            assert error["param"] == "messages[0].content[0].type"
            assert "this server reads no video (it would with --video)" in error["message"]
    refused = upload(client)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "purpose")
    assert "this server reads no video" in refused.json()["error"]["message"]
    assert not service.requests


def test_a_model_that_reads_text_only(client: Client, service: ScriptedService) -> None:
    service.images = None
    error = client.post(CHAT, chat(video_url())).json()["error"]
    assert error["message"] == f"{PLACE}: expected text, got video: this model reads text only"
    assert upload(client).json()["error"]["param"] == "purpose"


def test_other_dialects_have_no_videos(client: Client) -> None:
    data = f"data:video/mp4;base64,{coded(FILE)}"
    for path, body, place in (
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_video", "video_url": data}]}]},
         "input[0].content[0].type"),
        ("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": [{"type": "video"}]}]},
         "messages[0].content[0].type"),
    ):  # fmt: skip
        refused = client.post(path, {"model": "k2", **body})
        assert refused.status_code == 400
        assert f"{place}: expected" in refused.json()["error"]["message"]


def test_videos_are_bounded_in_number_and_tokens(client: Client, service: ScriptedService) -> None:
    error = client.post(CHAT, chat(*[video_url()] * 3)).json()["error"]
    assert error["message"] == "messages[0].content[2].video_url.url: expected at most 2 videos in a request, got 3"
    service.context_tokens = 10
    refused = client.post(CHAT, chat(video_url(), video_url()))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


# What it costs


def test_a_video_that_was_sent_before_is_not_decoded_again(
    make_client: Callable[..., Client], service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def watched(*given: Any) -> Video:
        decoded.append(given[2])
        return read_video(*given)

    monkeypatch.setattr(server_media, "read_video_apart", watched)
    client = make_client(api_keys=("anna", "ben"), limits=Limits(videos=2))
    for key, count in (("anna", 1), ("anna", 1), ("ben", 2), ("anna", 2)):
        reply = client.post(CHAT, chat(video_url()), headers={"x-api-key": key})
        assert reply.status_code == 200, reply.text
        check_video(service.requests[-1].messages[0]["content"][0]["video"])
        assert len(decoded) == count
    # One whose end is beyond the context is not kept: nobody shall get its beginning for the whole.
    other = f"data:video/mp4;base64,{coded(video(coloured(60), rate=2))}"
    service.context_tokens = 10
    anna = {"x-api-key": "anna"}
    assert client.post(CHAT, chat(video_url(other)), headers=anna).json()["error"]["code"] == "context_length_exceeded"
    service.context_tokens = 4096
    assert client.post(CHAT, chat(video_url(other)), headers=anna).status_code == 200
    assert service.requests[-1].messages[0]["content"][0]["video"].tokens == 15 * 6


def test_a_video_that_takes_long_holds_up_no_image(
    client: Client, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*given: Any) -> Video:
        begun.set()
        assert go_on.wait(50)
        return read_video(*given)

    monkeypatch.setattr(server_media, "read_video_apart", slow)

    async def work() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://server") as wire:
            asked = asyncio.ensure_future(wire.post(CHAT, json=chat(video_url())))
            try:
                while not begun.is_set():
                    await asyncio.sleep(0.01)
                assert (await wire.post(CHAT, json=chat(image_url()))).status_code == 200
                assert not asked.done()
            finally:
                go_on.set()
            assert (await asked).status_code == 200

    run(work())


def test_nothing_is_decoded_for_a_client_that_has_gone(
    client: Client, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gone_seen = threading.Event(), threading.Event()

    def waiting(*given: Any) -> Video:
        begun.set()
        stopped: Callable[[], bool] = given[-1]
        while not stopped():
            gone_seen.wait(0.01)
        gone_seen.set()
        return EXPECTED

    monkeypatch.setattr(server_media, "read_video_apart", waiting)
    run(post_and_leave(client, chat(video_url()), begun))
    assert gone_seen.wait(50)
    assert not service.requests


def test_the_log_and_the_metrics_count_videos(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        client.post(CHAT, chat(video_url(), image_url()))
    (line,) = (json.loads(JsonLines().format(one)) for one in caplog.records if one.name == "hybrid_k2.server")
    assert (line["videos"], line["images"]) == (1, 1)
    assert coded(FILE)[:40] not in caplog.text
    figures = client.get("/metrics").text
    assert "hybrid_k2_videos_total 1.0" in figures
    assert "hybrid_k2_images_total 1.0" in figures


# A server process with a model that sees


def test_the_video_decides_the_reply(tmp_path: Path) -> None:
    """Two videos with the same first clip: that much of the one's prompt is known from the other's."""
    model = write_checkpoint(tmp_path / "model", seed=3, num_hidden_layers=2)
    frames = coloured(16)
    files = [video(frames[:12], rate=2), video(frames[:12], rate=2), video(frames[:8] + frames[12:], rate=2)]
    with serving(tmp_path, "--video", model=model) as process:
        process.wait_ready()
        with httpx.Client(base_url=process.url, timeout=120) as wire:
            assert wire.get("/v1/models").json()["data"][0]["supports_video_in"] is True
            replies = []
            for data in files:
                part = video_url(f"data:video/mp4;base64,{coded(data)}")
                body = chat(part, text("What?"), temperature=0, max_tokens=3, ignore_eos=True, logprobs=True)
                answer = wire.post(CHAT, json={**body, "model": "model", "thinking": {"type": "disabled"}})
                assert answer.status_code == 200, answer.text
                replies.append(answer.json())
    used = [reply["usage"] for reply in replies]
    assert len({usage["prompt_tokens"] for usage in used}) == 1
    assert used[0]["prompt_tokens"] > 3 * 6, "three clips of six tokens, their times and what is around them"
    assert used[1]["cached_tokens"] > used[2]["cached_tokens"] >= 6
    first, again, other = (
        [token["logprob"] for token in reply["choices"][0]["logprobs"]["content"]] for reply in replies
    )
    assert first == pytest.approx(again, abs=1e-3)
    assert first != pytest.approx(other, abs=1e-3)

"""`chat --image` and `/image`: what a server gets, and what is refused before anything is asked or loaded."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from hybrid_k2.engine import Engine, SamplingParams
from hybrid_k2.engine.service import Service
from hybrid_k2.placement.sizes import format_bytes
from tests.cli.conftest import ONE_THREAD, Done
from tests.cli.socket_server import CHAT, SocketServer, as_json, delta, saying, stream
from tests.cli.terminal import Terminal
from tests.server.browser import site

Call = Callable[..., Done]
PROMPT = r"> $"
PNG = b"\x89PNG\r\n\x1a\n"
END = delta("stop") | {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}
ANSWER = stream(delta(content="A cat."), END)
REFUSAL = as_json({"error": {"message": "messages[0].content[0]: expected an image, got a damaged one"}}, 400)


def models(**fields: Any) -> bytes:
    return as_json({"object": "list", "data": [{"id": "k2", "context_length": 1000, **fields}]})


SEES: dict[str, bytes | list[bytes]] = {"/v1/models": models(supports_image_in=True)}


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    path = tmp_path / "my cat.png"
    pixels = np.random.default_rng(5).integers(0, 256, (40, 60, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


def part(path: Path) -> dict[str, Any]:
    """Return the part of a message that holds a file."""
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def asked(server: SocketServer) -> list[list[dict[str, Any]]]:
    """Return the messages of each request for a reply."""
    bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in server.requests if b"POST" in request[:4]]
    return [body["messages"] for body in bodies]


@pytest.mark.parametrize("stdin", [False, True])
def test_one_answer(call: Call, cat: Path, stdin: bool) -> None:
    other = cat.with_name("other.gif")
    other.write_bytes(b"GIF89a")
    with saying({**SEES, CHAT: ANSWER}) as server:
        prompt = ([], b"what?") if stdin else (["-p", "what?"], b"")
        done = call(
            "chat", "--server", server.url, "--image", cat, "--image", other, "--json", *prompt[0], stdin=prompt[1]
        )
        assert done.code == 0, done.err
        assert json.loads(done.out)["text"] == "A cat."
        ((message,),) = asked(server)
    gif = {"type": "image_url", "image_url": {"url": "data:image/gif;base64,R0lGODlh"}}
    assert message == {"role": "user", "content": [part(cat), gif, {"type": "text", "text": "what?"}]}


def test_files_that_cannot_be_sent(call: Call, cat: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with saying(SEES) as server:
        for path, words in (
            (tmp_path / "none.png", "cannot be read: No such file"),
            (tmp_path, "expected a regular file, got a folder"),
            (text, "expected a PNG, JPEG, WebP or GIF file, got one that begins with b'hello'"),
        ):
            done = call("chat", "--server", server.url, "-p", "what?", "--image", cat, "--image", path)
            assert (done.code, done.err.count("\n")) == (1, 1), done
            assert done.err.startswith(f"error: {path}: {words}")
        assert server.requests == []


def test_a_model_that_reads_text_only(call: Call, cat: Path, babbler: Path) -> None:
    for more in ([], ["--dry-run"], ["-q", "--json"]):
        done = call("chat", "demo", "-p", "what?", "--image", cat, *more)
        assert done == Done(
            1, "", "error: --image: expected a model that reads images, got demo, which reads text only\n"
        )
    for fields in ({}, {"supports_image_in": False}):
        with saying({"/v1/models": models(**fields)}) as server:
            done = call("chat", "--server", server.url, "-q", "-p", "what?", "--image", cat)
            assert asked(server) == []
        assert done == Done(
            1, "", "error: --image: expected a model that reads images, got k2, which reads text only\n"
        )


def test_what_a_model_cannot_read_is_refused_before_it_is_loaded(call: Call, cat: Path, babbler: Path) -> None:
    assert call("chat", babbler, "-p", "what?", "--image", cat, "--dry-run").code == 0
    cut = cat.with_name("cut.png")
    cut.write_bytes(cat.read_bytes()[:-500])
    for more in ([], ["--dry-run"]):
        done = call("chat", babbler, "-p", "what?", "--image", cat, "--image", cut, *more)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: --image cut.png: expected a PNG, JPEG, WebP or GIF image, got ")


def test_videos(call: Call, cat: Path, babbler: Path) -> None:
    """A server gets the file; one that reads none, and a model here with a damaged one, are not asked."""
    film = cat.with_name("film.bin")
    film.write_bytes(b"\x1aE\xdf\xa3 and no more")
    ask = ["-q", "-p", "what?", "--video", film, "--image", cat]
    with saying({"/v1/models": models(supports_image_in=True, supports_video_in=True), CHAT: ANSWER}) as server:
        assert call("chat", "--server", server.url, *ask).out == "A cat.\n"
        ((message,),) = asked(server)
    url = f"data:video/webm;base64,{base64.b64encode(film.read_bytes()).decode()}"
    video = {"type": "video_url", "video_url": {"url": url}}
    assert message["content"] == [part(cat), video, {"type": "text", "text": "what?"}]
    with saying(SEES) as server:
        done = call("chat", "--server", server.url, *ask)
        assert asked(server) == []
    expected = "expected a model that reads video, got k2, which reads text and images only"
    assert done == Done(1, "", f"error: --video: {expected}\n")
    pytest.importorskip("av", "17.1", reason="PyAV reads videos: pip install av pillow")
    done = call("chat", babbler, *ask, "--dry-run")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: --video film.bin: expected an MP4, MOV, ")


def test_a_server_that_refuses(call: Call, cat: Path) -> None:
    with saying({**SEES, CHAT: REFUSAL}) as server:
        done = call("chat", "--server", server.url, "-q", "-p", "what?", "--image", cat)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: {server.url}: 400: messages[0].content[0]: expected an image, got a damaged one\n"


def test_a_chat_with_images(environment: dict[str, str], cat: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    other = tmp_path / "second.png"
    other.write_bytes(PNG)
    home = environment | {"HOME": str(tmp_path)}
    with (
        saying({**SEES, CHAT: [ANSWER, REFUSAL, ANSWER, ANSWER, ANSWER]}) as server,
        Terminal(["chat", "--server", server.url, "--image", str(cat)], home) as user,
    ):
        size = format_bytes(cat.stat().st_size)
        assert f"with the next message: my cat.png, {size}\n" in user.wait_for(PROMPT)
        user.type("what?\r")
        assert "my cat.png" not in user.wait_for("A cat.")
        user.wait_for(PROMPT)

        user.type("/image\r")
        assert "no image goes with the next message" in user.wait_for(PROMPT)
        user.type("/image ~/my c\t\r")  # completed
        assert "with the next message: my cat.png" in user.wait_for(PROMPT)
        user.type('/image "~/second.png"\r')
        assert "with the next message: second.png, 8 B" in user.wait_for(PROMPT)
        user.type("/video ~/second.png\r")
        assert "error: /video: expected a model that reads video, got k2" in user.wait_for(PROMPT)
        user.type("/video\r")
        assert "no video goes with the next message" in user.wait_for(PROMPT)
        user.type("/video off\r")
        user.wait_for(PROMPT)
        user.type("/image ~/none\r")
        assert "cannot be read: No such file" in user.wait_for(PROMPT)
        user.type("/image\r")
        listed = user.wait_for(PROMPT)
        assert "my cat.png" in listed
        assert "second.png" in listed
        user.type("and these?\r")
        assert "a damaged one" in user.wait_for(PROMPT)
        user.type("and these?\r")  # they still go with it
        user.wait_for("A cat.")
        user.wait_for(PROMPT)

        user.type("/image ~/second.png\r")
        user.wait_for(PROMPT)
        user.type("/image off\r")
        assert "no image goes with" in user.wait_for(PROMPT)
        user.type("and now?\r")
        user.wait_for("A cat.")
        user.wait_for(PROMPT)
        user.type(f"/save {saved}\r")
        assert "saved 6 messages" in user.wait_for(PROMPT)
        user.type("/clear\r")
        user.wait_for(PROMPT)
        user.type(f"/load {saved}\r")
        assert "loaded 6 messages" in user.wait_for(PROMPT)
        user.type("/regen\r")
        user.wait_for("A cat.")
        user.wait_for(PROMPT)
        user.type("/exit\r")
        assert user.exit_code() == 0
        requests = asked(server)
    reply = {"role": "assistant", "content": "A cat."}
    first = {"role": "user", "content": [part(cat), {"type": "text", "text": "what?"}]}
    both = {"role": "user", "content": [part(cat), part(other), {"type": "text", "text": "and these?"}]}
    whole = [first, reply, both, reply, {"role": "user", "content": "and now?"}]
    assert [[{k: message[k] for k in ("role", "content")} for message in each] for each in requests] == [
        whole[:1],
        whole[:3],
        whole[:3],
        whole,
        whole,
    ]


def test_the_engine_here_and_a_server_see_the_same(call: Call, cat: Path, babbler: Path) -> None:
    content = [{"type": "image", "image": cat.read_bytes()}, {"type": "text", "text": "what?"}]
    params = SamplingParams(temperature=0, max_tokens=12)
    with Engine.load(babbler, ONE_THREAD[1]) as engine:
        expected = engine.chat([{"role": "user", "content": content}], thinking=False, params=params)
    ask = ["-p", "what?", "--image", cat, "-q", "--json", "--no-think", "--temperature", "0", "--max-tokens", "12"]
    here = json.loads(call("chat", babbler, *ONE_THREAD, *ask).out)
    assert tuple(here["token_ids"]) == expected.token_ids
    assert here["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    with Engine.load(babbler, ONE_THREAD[1]) as engine, Service(engine) as service, site(service, engine) as (url, _):
        there = json.loads(call("chat", "--server", url, *ask).out)
    assert there["text"] == expected.content
    assert there["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_a_chat_with_the_engine_here(babbler: Path, environment: dict[str, str], cat: Path) -> None:
    cut = cat.with_name("cut.png")
    cut.write_bytes(cat.read_bytes()[:-500])
    likeliest = ["--temperature", "0", "--no-think", "--max-tokens", "8", *ONE_THREAD]
    with Terminal(["chat", str(babbler), "-q", *likeliest], environment) as user:
        user.wait_for(PROMPT)
        user.type("what?\r")
        without = prompt_tokens(user)
        user.type(f"/image {cut}\r")
        user.wait_for(PROMPT)
        user.type("what?\r")
        assert "damaged or cut short" in user.wait_for(PROMPT).split("error: messages[2].content[0]")[1]
        user.type("/image off\r")
        user.wait_for(PROMPT)
        user.type("/clear\r")
        user.wait_for(PROMPT)
        user.type(f"/image {cat}\r")
        user.wait_for(PROMPT)
        user.type("what?\r")
        assert prompt_tokens(user) > without
        user.type("/exit\r")
        assert user.exit_code() == 0


def prompt_tokens(user: Terminal) -> int:
    """Wait for a reply's figures and the next prompt, and return how many tokens were read."""
    found = re.search(r"prefill\s+(\d+)", user.wait_for(PROMPT))
    assert found is not None
    return int(found[1])


def test_a_chat_with_a_model_that_reads_text_only(environment: dict[str, str], cat: Path) -> None:
    with (
        saying({"/v1/models": models(supports_image_in=False)}) as server,
        Terminal(["chat", "--server", server.url], environment) as user,
    ):
        user.wait_for(PROMPT)
        user.type(f"/image {cat}\r")
        assert "error: /image: expected a model that reads images, got k2" in user.wait_for(PROMPT)
        user.type("/exit\r")
        assert user.exit_code() == 0

"""A server that is killed under load, or while it saves: the next one answers as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.server.processes import ServerProcess, serving

STREAMS = 6


def body(prompt: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "seed": 5, "temperature": 1.0, "max_tokens": 16, "ignore_eos": True, **more}


def answers(server: ServerProcess, prompts: list[list[int]]) -> tuple[list[str], list[int]]:
    """Return the texts, and how many tokens of each prompt were cached."""
    texts, cached = [], []
    for prompt in prompts:
        response = httpx.post(f"{server.url}/v1/completions", json=body(prompt), timeout=120)
        assert response.status_code == 200, response.text
        reply = response.json()
        texts.append(reply["choices"][0]["text"])
        cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
    return texts, cached


@contextmanager
def load(server: ServerProcess, prompts: list[list[int]]) -> Iterator[list[int]]:
    """Stream long replies beside each other, until the server goes; give the list of those that have begun."""
    begun: list[int] = []

    def stream(number: int) -> None:
        request = body(prompts[number % len(prompts)][number:], max_tokens=3000, stream=True)
        with (
            suppress(httpx.HTTPError),
            httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=120) as response,
        ):
            for line in response.iter_lines():
                if line and number not in begun:
                    begun.append(number)

    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(stream, number) for number in range(STREAMS)]
        yield begun
        for one in streams:
            one.result(120)


def test_the_saved_prompts_outlive_a_kill_in_mid_load_and_in_mid_save(tmp_path: Path) -> None:
    chance = random.Random()
    prompts = [[chance.randrange(1500) for _ in range(400)] for _ in range(3)]
    file = tmp_path / "prompts.cache"
    options = ("--cache-ram", "64MiB", "--cache-file", file)

    with serving(tmp_path, *options) as server:
        server.wait_ready()
        expected, cached = answers(server, prompts)
        assert cached == [0] * 3
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
    saved = file.read_bytes()

    with serving(tmp_path, *options) as server:
        server.wait_ready()
        with load(server, prompts) as begun:
            while len(begun) < STREAMS:
                time.sleep(0.01)
            server.process.kill()
        assert server.ended() == -signal.SIGKILL
    assert file.read_bytes() == saved

    with serving(tmp_path, *options) as server:
        server.wait_ready()
        assert "is not used" not in server.text()
        assert answers(server, prompts) == (expected, [399] * 3)
        answers(server, [[chance.randrange(1500) for _ in range(2000)]])  # more to save
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while not file.with_name("prompts.cache.partial").exists() and server.process.poll() is None:
            assert time.monotonic() < deadline
        server.process.kill()
        server.process.wait()

    with serving(tmp_path, *options) as server:
        server.wait_ready()
        assert "is not used" not in server.text(), "the old file or the new one, whole"
        assert answers(server, prompts) == (expected, [399] * 3)
        server.process.kill()
        server.process.wait()

    file.write_bytes(saved[: chance.randrange(len(saved))])  # as a disk that fails leaves it
    with serving(tmp_path, *options) as server:
        server.wait_ready()
        assert "the saved prefix cache is not used" in server.text()
        assert answers(server, prompts) == (expected, [0] * 3)

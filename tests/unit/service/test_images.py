"""Requests with images: what is encoded when, what is cached, and nobody else's reply changes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hybrid_k2.engine import Engine, Reply, SamplingParams
from hybrid_k2.errors import EngineError, RequestError
from hybrid_k2.model.vision import VisionModel
from hybrid_k2.protocol.images import Image
from tests.engines import random_engine
from tests.pictures import ask, noise_png
from tests.services import CHUNK, PAGES, PARAMS, TIMEOUT_S, Client, alone, random_ids, same, serve

pytest.importorskip("PIL", reason="needs Pillow: pip install pillow")
SEEDED = SamplingParams(temperature=3.0, top_p=1.0, seed=3, max_tokens=6, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    sizes = {"q_lora_rank": 64, "qk_rope_head_dim": 32, "packed": True}
    rules = {"dtype": "bf16", "numerics": "exact", "chunk_tokens": CHUNK, "tokens": PAGES * 64}
    with random_engine(Path(tmp_path_factory.mktemp("model")), rules=rules, **sizes) as one:
        assert one.images is not None
        yield one


@pytest.fixture(autouse=True)
def nothing_is_known(engine: Engine) -> None:
    engine._prefix.release()
    engine.runner.sight.forget()


@dataclass
class Watch:
    """Note which images are encoded, and let the encoder fail, or do something first."""

    begun: list[int] = field(default_factory=list)
    before: Callable[[Image], None] = lambda image: None


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, begin = Watch(), VisionModel.begin

    def watched(self: VisionModel, image: Image) -> Any:
        watch.begun.append(image.digest)
        watch.before(image)
        return begin(self, image)

    monkeypatch.setattr(VisionModel, "begin", watched)
    return watch


def answer(engine: Engine, *parts: bytes | str, params: SamplingParams = SEEDED) -> Reply:
    return engine.chat(ask(*parts), params=params)


def test_an_image_takes_its_tokens_and_decides_the_answer(engine: Engine) -> None:
    text = answer(engine, "What is this?")
    one, other = (answer(engine, noise_png(112, 84, seed), "What is this?") for seed in (1, 2))
    assert one.usage.prompt_tokens == other.usage.prompt_tokens == text.usage.prompt_tokens + 4 * 3 + len("image\n") + 3
    assert one.logprobs != other.logprobs


def test_the_same_image_is_known_again_and_another_is_not(engine: Engine, watch: Watch) -> None:
    first = answer(engine, "Look: ", noise_png(112, 112), " What is it?")
    assert first.usage.cached_tokens == 0
    again = answer(engine, "Look: ", noise_png(112, 112), " What is it?")
    assert same(again, first)
    assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
    assert len(watch.begun) == 1
    other = answer(engine, "Look: ", noise_png(112, 112, seed=1), " What is it?")
    assert 0 < other.usage.cached_tokens < first.usage.prompt_tokens - 16
    assert len({*watch.begun}) == 2


def test_the_place_of_the_cut_does_not_matter(engine: Engine) -> None:
    """Prompts longer than a chunk, from caches that end within an image: the same bits as from nothing."""
    chance = random.Random()
    big = noise_png(28 * 9, 28 * 8)
    whole = answer(engine, big, "and", noise_png(30, 60), "?")
    engine._prefix.release()
    answer(engine, big, chance.choice(["and", "or"]), params=SamplingParams(max_tokens=1))
    assert same(answer(engine, big, "and", noise_png(30, 60), "?"), whole)


def test_replies_are_those_of_each_request_alone(engine: Engine) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    pictures = [noise_png(28 * chance.randint(1, 6), 28 * chance.randint(1, 6), number) for number in range(3)]
    questions = []
    for number in range(12):
        parts: list[bytes | str] = [*chance.choices([*pictures, "What is it? ", "Oh. "], k=3), f"{number % 4}"]
        questions.append((parts, SamplingParams(**{**vars(SEEDED), "seed": number})))
    expected = []
    for parts, params in questions:
        engine._prefix.release()
        expected.append(answer(engine, *parts, params=params))
    engine._prefix.release()
    engine.runner.sight.forget()
    prompt = random_ids(chance, 100)
    text = alone(engine, prompt, PARAMS)
    with serve(engine, max_running=4, step_tokens=20) as service:
        beside = Client(service, prompt, PARAMS)
        clients = [Client(service, None, params, messages=ask(*parts)) for parts, params in questions]
        for client, reply in zip(clients, expected, strict=True):
            assert same(client.reply, reply)
        assert same(beside.reply, text)
        assert service.stats().failed == 0


def test_a_sequence_that_gave_up_its_pages_sees_again(
    engine: Engine, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four prompts of two pages are there at once, their replies need a third, and no two images have room together."""
    monkeypatch.setattr("hybrid_k2.engine.sight.FEATURE_ROWS", 100)
    questions = [ask(noise_png(28 * 9, 28 * 9, number), "?" * 8) for number in range(4)]
    params = [SamplingParams(**{**vars(SEEDED), "seed": number, "max_tokens": 60}) for number in range(4)]
    expected = []
    for messages, one in zip(questions, params, strict=True):
        engine._prefix.release()
        expected.append(engine.chat(messages, params=one))
    # Each step brings an image on by a piece at least: all reach their third page before the first has its 60 tokens.
    assert all(64 < reply.usage.prompt_tokens < 128 < reply.usage.prompt_tokens + 20 for reply in expected)
    engine._prefix.release()
    engine.runner.sight.forget()
    submitted = threading.Event()

    def wait(image: Image) -> None:
        assert submitted.wait(TIMEOUT_S)

    watch.begun, watch.before = [], wait
    with serve(engine, max_running=4) as service:
        clients = [Client(service, None, one, messages=asked) for asked, one in zip(questions, params, strict=True)]
        submitted.set()
        assert all(same(client.reply, reply) for client, reply in zip(clients, expected, strict=True))
        assert service.stats().preemptions > 0
        assert service.stats().failed == 0
    assert len({*watch.begun}) == len(questions)


def test_choices_share_an_image(engine: Engine, watch: Watch) -> None:
    messages = ask(noise_png(112, 112), "What is it?")
    with serve(engine) as service:
        client = Client(service, None, SEEDED, messages=messages, n=3)
        assert len(client.replies) == 3
    assert len(watch.begun) == 1


def test_a_failing_encoder_ends_its_own_request_only(engine: Engine, watch: Watch) -> None:
    def fail(image: Image) -> None:
        raise EngineError("vision: broken")

    watch.before = fail
    prompt = random_ids(random.Random(), 60)
    with serve(engine) as service:
        text = Client(service, prompt, PARAMS)
        assert "broken" in Client(service, None, SEEDED, messages=ask(noise_png(56, 56), "?")).error.message
        assert len(text.reply.token_ids) == PARAMS.max_tokens
        watch.before = lambda image: None
        assert Client(service, None, SEEDED, messages=ask(noise_png(56, 56), "?")).reply.token_ids


def test_cancelling_while_an_image_is_encoded(engine: Engine, watch: Watch) -> None:
    submitted = threading.Event()
    clients: list[Client] = []

    def cancel(image: Image) -> None:
        assert submitted.wait(TIMEOUT_S)
        clients[0].ticket.cancel()

    with serve(engine) as service:
        watch.before = cancel
        clients.append(Client(service, None, SEEDED, messages=ask("a", noise_png(500, 500), "?")))
        submitted.set()
        reply = clients[0].reply
        assert (reply.finish_reason, reply.token_ids) == ("cancelled", ())
        watch.before = lambda image: None
        assert Client(service, None, SEEDED, messages=ask(noise_png(56, 56), "?")).reply.token_ids


def test_what_a_prompt_with_images_cannot_have(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="prompt_logprobs: expected a prompt of text alone"):
        answer(engine, noise_png(28, 28), params=SamplingParams(logprobs=1, prompt_logprobs=True))
    with random_engine(tmp_path, model_type="kimi_k2") as blind:
        assert blind.images is None
        with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\]"):
            answer(blind, noise_png(28, 28), "?")


def test_penalties_count_text_alone(engine: Engine) -> None:
    params = SamplingParams(**{**vars(SEEDED), "repetition_penalty": 1.5, "presence_penalty": 0.5})
    assert len(answer(engine, noise_png(56, 56), "What is it?", params=params).token_ids) == SEEDED.max_tokens


def test_a_saved_prefix_cache_knows_images(engine: Engine, tmp_path: Path, watch: Watch) -> None:
    messages, file = ask(noise_png(28 * 8, 28 * 9), "What is it?"), tmp_path / "cache"
    with serve(engine, cache_ram_bytes=1 << 24, cache_path=file) as service:
        first = Client(service, None, SEEDED, messages=messages).reply
    engine._prefix.release()
    with serve(engine, cache_ram_bytes=1 << 24, cache_path=file) as service:
        again = Client(service, None, SEEDED, messages=messages).reply
    assert same(again, first)
    assert again.usage.cached_tokens > 64
    assert len(watch.begun) == 1

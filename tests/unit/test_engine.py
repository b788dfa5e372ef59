"""The Python API: loading, logits, chat on the demo checkpoint, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hybrid_k2
from hybrid_k2.demo import demo_path
from hybrid_k2.engine import Engine, FinishEvent, SamplingParams
from hybrid_k2.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    EngineError,
    MemoryBudgetError,
    RequestError,
    RulesError,
)
from hybrid_k2.protocol.tokenizer import WINDOW_CHARS
from tests.conftest import REPO
from tests.engines import GREEDY, free_pages, generated, host_rules, random_engine
from tests.generators import write_checkpoint, write_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Compute an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "What to compute"}},
            "required": ["expression"],
        },
    },
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with random_engine(Path(tmp_path_factory.mktemp("model")), rules={"tokens": 256}) as one:
        yield one


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    with Engine.load("demo", host_rules(dtype="bf16", numerics="exact", tokens=1024, chunk_tokens=512)) as one:
        yield one


def ask(engine: Engine, text: str, **params: Any) -> hybrid_k2.Reply:
    return engine.chat([{"role": "user", "content": text}], params=SamplingParams(**params))


# Loading


def test_the_public_names_are_imported_on_first_use() -> None:
    assert hybrid_k2.Engine is Engine
    assert hybrid_k2.SamplingParams is SamplingParams
    code = "import hybrid_k2, sys; hybrid_k2.Reply; assert 'torch' not in sys.modules; hybrid_k2.Engine"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPO).returncode == 0


def test_the_plan_is_shown_before_anything_large_is_read(tmp_path: Path) -> None:
    calls: list[str] = []
    reports: list[tuple[int, int]] = []

    def on_plan(plan: Any) -> None:
        assert not reports
        calls.append(plan.rules.source)

    with Engine.load(
        write_checkpoint(tmp_path), host_rules(), on_plan=on_plan, progress=lambda *r: reports.append(r)
    ) as engine:
        assert calls == ["test.yaml"]
        assert reports[-1][0] == reports[-1][1] > 0
        assert [done for done, _ in reports] == sorted(done for done, _ in reports)
        assert engine.experts_name == "reference, fp32"
        assert str(tmp_path) in repr(engine)


def test_an_exception_from_on_plan_ends_the_loading(tmp_path: Path) -> None:
    def refuse(plan: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine.load(write_checkpoint(tmp_path), host_rules(), on_plan=refuse)


@pytest.mark.parametrize("rules", ["reference", "reference.yaml", REPO / "rules" / "reference.yaml"])
def test_rules_by_name_or_path(tmp_path: Path, rules: str | Path) -> None:
    with Engine.load(str(write_checkpoint(tmp_path, num_hidden_layers=1)), rules) as engine:
        assert engine.plan.numerics == "reference"


def never(*_: Any) -> None:
    raise AssertionError("the checkpoint was read or planned although it is wrong")


def test_what_is_wrong_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    def load(rules: Any = None) -> None:
        Engine.load(tmp_path, rules or host_rules(), on_plan=never, progress=never)

    with pytest.raises(CheckpointError, match="empty"):
        load()
    write_checkpoint(tmp_path)
    with pytest.raises(RulesError, match=r"nowhere\.yaml"):
        load("nowhere.yaml")
    for rules in (3, b"x", {"place": []}):
        with pytest.raises(RulesError, match="rules: expected a rule file or the name of a shipped one, got "):
            load(rules)
    for rules in ([], {}, ()):
        with pytest.raises(RulesError, match=r"rules: expected a rule file .*, got (\[\]|{}|\(\))"):
            Engine.load(tmp_path, rules, on_plan=never, progress=never)
    write_tokenizer(tmp_path, 600)
    with pytest.raises(CheckpointError, match=r"tiktoken\.model: expected vocab_size = 512 tokens, got 600"):
        load()
    write_tokenizer(tmp_path, 512)
    (tmp_path / "generation_config.json").write_text('{"temperature": -3}')
    with pytest.raises(ConfigError, match=r"temperature: expected a number from 0 to 100, got -3") as caught:
        load()
    assert caught.value.message.startswith(f"{tmp_path / 'generation_config.json'}: temperature: ")
    for value in ("no", 10**400):
        name = "temperature" if value != "no" else "do_sample"
        (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
        with pytest.raises(ConfigError, match=rf"generation_config\.json: {name}: expected "):
            load()
    (tmp_path / "generation_config.json").unlink()
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load()


def test_demo_is_the_built_in_model_whatever_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="empty"):
        Engine.load("./demo")
    with Engine.load("demo", host_rules()) as engine:
        assert engine.folder == demo_path()


# Logits


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_logits_are_those_of_generation(engine: Engine, length: int) -> None:
    ids = np.random.default_rng().integers(0, engine.config.vocab_size, length)
    logits = engine.logits(ids)
    assert logits.dtype == np.float32
    assert logits.shape == (length, engine.config.vocab_size)
    assert generated(engine, ids.tolist(), max_tokens=1).token_ids == (int(logits[-1].argmax()),)
    # Causal: what comes later changes nothing. Chunks end elsewhere, so rounding may differ by a few fp32 steps.
    shorter = engine.logits(ids[: (length + 1) // 2].tolist())
    np.testing.assert_allclose(logits[: len(shorter)], shorter, atol=1e-4)


def test_logits_leave_room_for_the_next_request(engine: Engine) -> None:
    generated(engine, [1] * 200, max_tokens=2)  # its pages are kept
    engine.logits([2] * 256)  # needs all of them
    assert free_pages(engine) == engine._cache.pool.pages
    generated(engine, [1] * 150, max_tokens=2)
    engine.logits([2] * 10)  # does not need them
    assert generated(engine, [1] * 150, max_tokens=2).usage.cached_tokens == 149


@pytest.mark.parametrize("bad", [-1, 512, 1.5, "1", None, True, np.nan])
def test_bad_ids_are_refused(engine: Engine, bad: Any) -> None:
    with pytest.raises(RequestError, match=r"token_ids\[1\]: expected an id from 0 to 511, got"):
        engine.logits([1, bad])
    with pytest.raises(RequestError, match=r"token_ids\[1\]: expected an id from 0 to 511, got"):
        engine.generate([1, bad])
    with pytest.raises(RequestError, match="expected at least one token"):
        engine.logits([])


def test_ids_may_come_from_any_iterable(engine: Engine) -> None:
    expected = engine.logits([5, 6, 7])
    for ids in (iter([5, 6, 7]), (token for token in (5, 6, 7)), np.array([5, 6, 7]), (5, 6, 7)):
        assert engine.generate(ids).prompt_tokens == 3
    np.testing.assert_array_equal(engine.logits(token for token in (5, 6, 7)), expected)
    for empty in ([], iter([]), np.array([], np.int64)):
        with pytest.raises(RequestError, match="prompt: expected at least one token, got none"):
            engine.generate(empty)


@pytest.mark.parametrize("unordered", [5, 1.5, None, b"ab", {1, 2}, {1: 2}, np.array(5)])
def test_what_is_no_sequence_of_ids_is_refused(engine: Engine, unordered: Any) -> None:
    with pytest.raises(RequestError, match="prompt: expected text or token ids in their order, got"):
        engine.logits(unordered)


def test_a_reply_is_not_lost_where_memory_is_too_short_to_measure_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_k2.experts.read_probe.host_memory", lambda: (1 << 34, 100 << 20))
    with random_engine(tmp_path, packed=True) as engine:
        reply = generated(engine, [1, 2, 3], max_tokens=3)
        assert reply.finish_reason == "length"
        assert reply.timings.memory_share is None
        with pytest.raises(MemoryBudgetError, match="to measure it"):
            _ = engine.read_gbps


# Requests that are wrong


def test_sizes_are_named_when_a_request_is_too_long(engine: Engine) -> None:
    with pytest.raises(
        RequestError, match=r"expected at most 256 tokens \(the size of the KV cache\), got 257"
    ) as caught:
        engine.generate([1] * 257)
    assert "kv_cache" in (caught.value.hint or "")
    with pytest.raises(ContextLengthError, match=r"at most 256 tokens \(the size of the KV cache\), got 257"):
        engine.logits([1] * 257)
    with pytest.raises(RequestError, match=r"within 256 tokens .* got a prompt of 250 and max_tokens = 7"):
        engine.generate([1] * 250, params=SamplingParams(max_tokens=7))
    with pytest.raises(RequestError, match=r"within 256 tokens .* got a prompt of 256 and max_tokens = 1"):
        engine.generate([1] * 256)
    engine.generate([1] * 250, params=SamplingParams(max_tokens=6))


def test_the_models_context_is_the_other_limit(tmp_path: Path) -> None:
    with random_engine(tmp_path, rules={"tokens": 40}, max_position_embeddings=40) as engine:
        assert engine.context_tokens == 40
        with pytest.raises(ContextLengthError, match=r"at most 40 tokens \(the model's context\), got 41"):
            engine.generate([1] * 41)
        with pytest.raises(ContextLengthError, match=r"within 40 tokens \(the model's context\)"):
            engine.generate([1] * 40)
        text = "ab " * (WINDOW_CHARS // 2)
        beginning = len(engine.tokenizer.encode(text[:WINDOW_CHARS]))
        with pytest.raises(ContextLengthError, match=f"got {beginning} or more"):
            engine.generate(text)
        with pytest.raises(ContextLengthError) as error:
            ask(engine, text)
        assert int(error.value.message.split()[-3]) < beginning + 100, "the rest is not encoded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected prompt or messages, got neither"),
        ({"prompt": "a", "messages": HELLO}, "expected prompt or messages, got both"),
        ({"prompt": "a", "tools": [CALCULATOR]}, "with messages only"),
        ({"prompt": ""}, "at least one token"),
        ({"prompt": 5}, "prompt: expected text or token ids in their order, got 5"),
        ({"prompt": 10**6000}, "prompt: expected text or token ids in their order, got a value too large to show"),
        ({"prompt": [1, 10**6000]}, r"token_ids\[1\]: expected an id from 0 to 511, got a value too large to show"),
        ({"prompt": "a", "params": 10**6000}, "params: expected SamplingParams, got a value too large to show"),
        ({"messages": []}, "messages: expected at least one message, got none"),
        ({"messages": HELLO, "thinking": "no"}, "thinking: expected True or False, got 'no'"),
        ({"prompt": "a", "thinking": None}, "thinking: expected True or False, got None"),
        ({"messages": HELLO, "preserve_thinking": 1}, "preserve_thinking: expected True or False, got 1"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"prompt": "a", "params": SamplingParams(stop_token_ids=[512])}, "stop_token_ids"),
        ({"prompt": "a", "params": {"temperature": 1}}, "params: expected SamplingParams, got"),
    ],
)
def test_a_wrong_request_is_refused_at_once(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate(**arguments)
    assert generated(engine, [1, 2, 3], max_tokens=2).finish_reason == "length"


# Closing


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    engine = random_engine(tmp_path)
    waiting = engine.generate([1, 2, 3], params=GREEDY)
    started = engine.generate([1, 2, 3], params=GREEDY)
    next(started)
    engine.close()
    engine.close()
    assert next(started, None) is None
    assert next(waiting, None) is None
    assert "closed" in repr(engine)
    for call in (
        lambda: engine.logits([1]),
        lambda: engine.generate([1]),
        lambda: engine.chat(HELLO),
        lambda: engine.read_gbps,
    ):
        with pytest.raises(EngineError, match="engine: expected an open one"):
            call()
    assert started.reply.finish_reason == "cancelled"


def test_close_waits_for_no_other_thread(tmp_path: Path) -> None:
    with random_engine(tmp_path) as engine:
        inside, leave = threading.Event(), threading.Event()

        def hold(done: int, total: int) -> None:
            inside.set()
            leave.wait(30)

        events: list[Any] = []
        generation = engine.generate([1, 2, 3], params=GREEDY, on_prefill=hold)
        reader = threading.Thread(target=lambda: events.extend(generation))
        reader.start()
        inside.wait(30)
        with pytest.raises(EngineError, match="got one that is computing"):
            engine.close()
        generation.cancel()
        leave.set()
        reader.join()
        assert isinstance(events[-1], FinishEvent)


# The demo checkpoint


def test_the_demo_answers(demo: Engine) -> None:
    reply = ask(demo, "What is 17 + 25?", temperature=0)
    assert "42" in reply.content
    assert reply.reasoning
    assert reply.finish_reason == "stop"
    assert 0 < reply.usage.reasoning_tokens < reply.usage.completion_tokens == len(reply.token_ids)
    instant = demo.chat(HELLO, thinking=False, params=SamplingParams(temperature=0))
    assert instant.content
    assert not instant.reasoning
    assert instant.usage.reasoning_tokens == 0


def test_events_joined_are_the_reply(demo: Engine) -> None:
    generation = demo.generate(
        messages=[{"role": "user", "content": "What is 3481 * 27?"}],
        tools=[CALCULATOR],
        params=SamplingParams(temperature=0),
    )
    *events, last = generation
    assert isinstance(last, FinishEvent)
    reply = last.reply
    for kind, text in (("content", reply.content), ("reasoning", reply.reasoning)):
        assert "".join(event.text for event in events if event.kind == kind) == text
    (call,) = reply.tool_calls
    assert "".join(event.text for event in events if event.kind == "tool_call_arguments") == call.arguments
    assert (call.name, reply.finish_reason) == ("calculator", "tool_calls")
    assert "3481" in json.loads(call.arguments)["expression"]
    assert generation.reply == reply


def test_a_tool_round_trip_through_the_message(demo: Engine) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 3481 * 27?"}]
    params = SamplingParams(temperature=0)
    reply = demo.chat(messages, tools=[CALCULATOR], params=params)
    messages.append(reply.message())
    assert json.loads(json.dumps(messages)) == messages
    messages += [{"role": "tool", "tool_call_id": call.id, "content": '{"result": 93987}'} for call in reply.tool_calls]
    answer = demo.chat(messages, tools=[CALCULATOR], params=params)
    assert "93987" in answer.content
    # The turn in progress keeps its thinking, so all but the end token of the reply is still in the cache.
    assert answer.usage.cached_tokens >= reply.usage.prompt_tokens + reply.usage.completion_tokens - 1


def test_a_reply_is_json_ready(demo: Engine) -> None:
    reply = ask(demo, "hello", seed=7, max_tokens=5)
    data = json.loads(json.dumps(reply.to_dict()))
    assert data["seed"] == 7
    assert data["finish_reason"] == "length"
    assert data["usage"] == {
        "prompt_tokens": reply.usage.prompt_tokens,
        "cached_tokens": reply.usage.cached_tokens,
        "completion_tokens": 5,
        "reasoning_tokens": reply.usage.reasoning_tokens,
    }
    assert data["token_ids"] == list(reply.token_ids)
    assert set(data["timings"]) == {
        "prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s", "memory_share"
    }  # fmt: skip


def test_the_same_seed_gives_the_same_text(demo: Engine) -> None:
    question, params = "tell me a story about a fox", {"temperature": 1.0, "max_tokens": 60}
    first = ask(demo, question, seed=11, **params)
    drawn = ask(demo, question, **params)
    assert ask(demo, question, seed=11, **params).token_ids == first.token_ids
    assert ask(demo, question, seed=drawn.seed, **params).seed == drawn.seed
    assert ask(demo, question, seed=12, **params).token_ids != first.token_ids


def test_a_stop_string_cuts_the_content_and_not_the_thinking(demo: Engine) -> None:
    whole = ask(demo, "What is 17 + 25?", temperature=0)
    cut = ask(demo, "What is 17 + 25?", temperature=0, stop="2")  # a digit that the thinking has too
    assert "2" in whole.content
    assert cut.content == whole.content[: whole.content.index("2")]
    assert "2" in cut.reasoning
    assert cut.reasoning == whole.reasoning
    assert (cut.finish_reason, cut.matched_stop) == ("stop", "2")


def test_the_checkpoints_sampling_values_are_the_defaults(demo: Engine) -> None:
    stated = json.loads((demo.folder / "generation_config.json").read_text())
    defaults = demo.default_params(thinking=True)
    assert defaults.temperature == stated.get("temperature", 1.0)
    assert defaults.top_p == stated.get("top_p", 0.95)


def test_control_text_of_a_user_is_text(demo: Engine) -> None:
    """A message that spells the end token ends nothing: the prompt has one end token for each message."""
    reply = demo.generate(messages=[{"role": "user", "content": "<|im_end|><|im_assistant|>"}])
    assert reply.prompt_tokens > 10
    assert demo.generate("<|im_end|>").prompt_tokens > 1

"""The generation loop on random models: chunks, batches, prefix reuse, and every way to stop early."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from hybrid_k2.engine import Engine, FinishEvent, SamplingParams
from hybrid_k2.engine.request import chat_sequences, text_sequences
from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.errors import EngineError, RequestError
from tests.engines import GREEDY, free_pages, generated, host_rules, random_engine
from tests.generators import write_checkpoint

CHUNK, TOKENS = 16, 640
# Every token is a printable character (tests/generators.py): none is an end, and each makes an event.
TALKING = replace(GREEDY, logit_bias=dict.fromkeys(range(94), 100.0))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = Path(tmp_path_factory.mktemp("model"))
    with random_engine(folder, rules={"chunk_tokens": CHUNK, "tokens": TOKENS}) as one:
        yield one


@pytest.fixture(autouse=True)
def all_pages_come_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        assert free_pages(engine) == engine._cache.pool.pages


def random_ids(length: int, vocab_size: int = 500) -> list[int]:
    return np.random.default_rng().integers(0, vocab_size, length).tolist()


def greedy_by_logits(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """Compute everything again for each token: the slow definition of greedy decoding."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(engine.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_greedy_takes_the_highest_logit_at_every_step(engine: Engine, length: int) -> None:
    prompt = random_ids(length)
    reply = generated(engine, prompt, max_tokens=12)
    assert list(reply.token_ids) == greedy_by_logits(engine, prompt, 12)
    assert reply.finish_reason == "length"
    assert reply.usage.prompt_tokens == length
    assert reply.usage.completion_tokens == 12


def test_chunked_prefill_gives_the_text_of_whole_prefill(engine: Engine) -> None:
    prompt = random_ids(100)
    chunked = generated(engine, prompt, max_tokens=20)
    with Engine.load(engine.folder, engine.plan.rules) as whole:
        whole.runner.chunk_tokens = 512
        assert generated(whole, prompt, max_tokens=20).token_ids == chunked.token_ids


def test_steps_mix_prefill_and_decode_of_many_sequences(engine: Engine) -> None:
    """A batch of sequences that start at different times gives each the tokens that it gets alone."""
    prompts = [random_ids(length) for length in (3, CHUNK, 2 * CHUNK + 7, 50)]
    alone = [list(generated(engine, prompt, max_tokens=9).token_ids) for prompt in prompts]
    engine._prefix.release()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=9)
    waiting = [text_sequences(engine.loaded, prompt, False, params)[0] for prompt in prompts]
    everyone = list(waiting)
    running = [waiting.pop(0)]
    while running:
        work = [(sequence, sequence.next_chunks(CHUNK)) for sequence in running]
        for (sequence, chunks), logits in zip(work, engine.runner.forward(work), strict=True):
            sequence.chunks_done(chunks)
            if logits is not None:
                sequence.sample(logits)
        if waiting:
            running.append(waiting.pop(0))
        running = [sequence for sequence in running if sequence.finish_reason is None]
    assert [sequence.completion for sequence in everyone] == alone
    for sequence in everyone:
        engine._cache.pool.free(sequence.pages)


def test_prefill_reports_its_progress(engine: Engine) -> None:
    prompt, reports = random_ids(2 * CHUNK + 3), []
    for _ in engine.generate(prompt, params=GREEDY_4, on_prefill=lambda done, total: reports.append((done, total))):
        pass
    assert reports == [(done, len(prompt)) for done in (0, CHUNK, 2 * CHUNK, 2 * CHUNK + 3)]


GREEDY_4 = SamplingParams(temperature=0, ignore_eos=True, max_tokens=4)


# Prefix reuse


@pytest.mark.parametrize(("shared", "total"), [(0, 20), (1, 2), (40, 41), (70, 100), (CHUNK, 2 * CHUNK), (64, 128)])
def test_text_with_reuse_is_the_text_without(engine: Engine, shared: int, total: int) -> None:
    first = random_ids(total)
    second = first[:shared] + [(token + 1) % 500 for token in first[shared:total]]
    engine._prefix.release()
    fresh = generated(engine, second, max_tokens=10)
    engine._prefix.release()
    assert generated(engine, first, max_tokens=10).usage.cached_tokens == 0
    again = generated(engine, second, max_tokens=10)
    assert again.usage.cached_tokens == shared
    assert again.token_ids == fresh.token_ids


def test_the_reply_itself_is_reused(engine: Engine) -> None:
    """The next turn of a conversation: everything but the last sampled token, which was never computed."""
    prompt = random_ids(30)
    reply = generated(engine, prompt, max_tokens=25)
    longer = [*prompt, *reply.token_ids, *random_ids(9)]
    second = generated(engine, longer, max_tokens=10)
    assert second.usage.cached_tokens == 30 + 25 - 1
    engine._prefix.release()
    assert generated(engine, longer, max_tokens=10).token_ids == second.token_ids


def test_at_least_one_token_is_computed(engine: Engine) -> None:
    prompt = random_ids(21)
    first = generated(engine, prompt, max_tokens=6)
    second = generated(engine, prompt, max_tokens=6)
    assert second.usage.cached_tokens == 20
    assert second.token_ids == first.token_ids


def test_a_seed_repeats_bit_for_bit_whatever_ran_before(tmp_path: Path) -> None:
    """In bf16 the last bits of a latent depend on the chunk that it was computed in, and a flat model shows it."""
    with random_engine(tmp_path, rules={"dtype": "bf16", "chunk_tokens": CHUNK}) as engine:
        seeded = SamplingParams(temperature=5.0, top_p=1, seed=3, max_tokens=40, ignore_eos=True)
        prompt = random_ids(3 * CHUNK + 5)
        first = generated(engine, prompt, seeded)
        assert generated(engine, prompt, seeded).token_ids == first.token_ids
        for shared in (0, 1, CHUNK, 2 * CHUNK + 3, len(prompt)):
            engine._prefix.release()
            generated(engine, prompt[:shared] + random_ids(10), max_tokens=7, seed=9)
            again = generated(engine, prompt, seeded)
            assert again.token_ids == first.token_ids
            assert again.usage.cached_tokens == min(shared // CHUNK, 3) * CHUNK
        assert generated(engine, prompt, seeded, seed=4).token_ids != first.token_ids


def test_a_seed_trusts_only_whole_chunks_on_whole_chunks(engine: Engine) -> None:
    """A chunk that follows one computed in part is not what a fresh run would give, though it is whole itself."""
    prompt = random_ids(5 * CHUNK)
    generated(engine, prompt[: 2 * CHUNK + 3], max_tokens=1, seed=1)
    assert generated(engine, prompt, max_tokens=1).usage.cached_tokens == 2 * CHUNK + 3
    assert generated(engine, prompt, max_tokens=1, seed=1).usage.cached_tokens == 2 * CHUNK
    assert generated(engine, prompt, max_tokens=1, seed=1).usage.cached_tokens == 5 * CHUNK - CHUNK // 2


# Ends


def test_an_end_token_stops_and_is_not_shown(engine: Engine) -> None:
    prompt = random_ids(10)
    free_run = generated(engine, prompt, TALKING, max_tokens=12)
    end = free_run.token_ids[5]
    place = free_run.token_ids.index(end)
    reply = generated(engine, prompt, TALKING, max_tokens=12, stop_token_ids=[end])
    assert reply.token_ids == free_run.token_ids[: place + 1]
    assert (reply.finish_reason, reply.matched_stop) == ("stop", end)
    assert reply.content == engine.tokenizer.decode(free_run.token_ids[:place])


def test_the_models_end_token_stops_unless_ignored(engine: Engine) -> None:
    end = engine.config.eos_token_ids[0]
    forced = {"logit_bias": {end: 100.0}, "max_tokens": 3}
    reply = generated(engine, random_ids(5), SamplingParams(temperature=0), **forced)
    assert (reply.token_ids, reply.content, reply.finish_reason) == ((end,), "", "stop")
    assert reply.matched_stop is None
    reply = generated(engine, random_ids(5), GREEDY, **forced)
    assert (reply.token_ids, reply.content, reply.finish_reason) == ((end,) * 3, "", "length")


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_end_comes_before_the_least_number_of_tokens(engine: Engine, temperature: float) -> None:
    end, stop = engine.config.eos_token_ids[0], 77
    params = SamplingParams(temperature=temperature, stop_token_ids=[stop], logit_bias={end: 100.0, stop: 100.0})
    for least in (0, 1, 5):
        reply = generated(engine, random_ids(5), params, min_tokens=least, max_tokens=9)
        assert len(reply.token_ids) == least + 1
        assert reply.token_ids[-1] in (end, stop)
        assert not {end, stop} & set(reply.token_ids[:-1])


def write(engine: Engine, text: str, end: str | None) -> TokenSequence:
    """Make a thinking chat's sequence write this text, one likeliest token after the other."""
    params = SamplingParams(temperature=0, max_tokens=len(text))
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
    (sequence,) = chat_sequences(engine.loaded, [{"role": "user", "content": "hi"}], tools, True, False, params)
    ids = engine.tokenizer.encode(text, allow_special=True)
    for token in [*ids, *([engine.tokenizer.token_id(end)] if end else [])]:
        sequence.sample(functional.one_hot(torch.tensor(token), engine.config.vocab_size).float())
    if end is None:
        sequence.finish("length")
    return sequence


@pytest.mark.parametrize(("end", "calls", "reason"), [("<|im_end|>", 1, "tool_calls"), (None, 0, "length")])
def test_the_end_of_the_turn_completes_a_call_whose_arguments_are_whole(
    engine: Engine, end: str | None, calls: int, reason: str
) -> None:
    begun = "<|tool_calls_section_begin|><|tool_call_begin|>functions.clock:0<|tool_call_argument_begin|>{}"
    sequence = write(engine, f"now</think>{begun}", end)
    assert (len(sequence.output.tool_calls), sequence.finish_reason) == (calls, reason)
    assert "im_end" not in sequence.output.content + sequence.output.reasoning


def asked_twice(call_id: str) -> list[dict[str, Any]]:
    """A conversation with one call and its result, whose id is the client's choice."""
    call = {"id": call_id, "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    return [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "noon"},
    ]


def test_the_model_reads_ids_of_its_own_form_whatever_the_clients_are(engine: Engine) -> None:
    own, foreign = (
        chat_sequences(engine.loaded, asked_twice(call_id), None, True, False, SamplingParams())[0]
        for call_id in ("functions.clock:0", "call_aB3")
    )
    assert foreign.tokens == own.tokens


def test_a_continued_answer_does_not_think(engine: Engine) -> None:
    begun = {"role": "assistant", "content": "It is", "partial": True}
    (sequence,) = chat_sequences(
        engine.loaded, [{"role": "user", "content": "When?"}, begun], None, True, False, SamplingParams()
    )
    (token,) = engine.tokenizer.encode("x")
    sequence.sample(functional.one_hot(torch.tensor(token), engine.config.vocab_size).float() * 1000)
    sequence.finish("length")
    assert (sequence.output.content, sequence.output.reasoning) == ("x", "")
    assert sequence.usage().reasoning_tokens == 0


@pytest.mark.parametrize("end", ["<|im_end|>", "[EOS]", "[EOT]"])
def test_every_end_of_a_turn_ends_a_chat_whatever_the_config_names(end: str, tmp_path: Path) -> None:
    """K2.5's config names [EOS] alone."""
    write_checkpoint(tmp_path, num_hidden_layers=1, packed=False)
    for name in ("config.json", "generation_config.json"):
        text = (tmp_path / name).read_text()
        changed = re.sub(r'"eos_token_id": \d+', '"eos_token_id": 257', text)
        assert changed != text
        (tmp_path / name).write_text(changed)
    with Engine.load(tmp_path, host_rules()) as engine:
        assert engine.config.eos_token_ids == (engine.tokenizer.token_id("[EOS]"),)
        sequence = write(engine, "let me see</think>hello", end)
        assert (sequence.output.content, sequence.finish_reason) == ("hello", "stop")
        ignoring = SamplingParams(ignore_eos=True, logit_bias={engine.tokenizer.token_id(end): 100.0}, max_tokens=3)
        reply = engine.chat([{"role": "user", "content": "hi"}], params=ignoring)
        assert (reply.usage.completion_tokens, reply.content, reply.finish_reason) == (3, "", "length")


def test_a_stop_string_ends_the_generation(engine: Engine) -> None:
    prompt = random_ids(10)
    text = generated(engine, prompt, max_tokens=30).content
    stop = text[11:14]
    reply = generated(engine, prompt, max_tokens=30, stop=stop)
    assert reply.content == text[: text.index(stop)]
    assert (reply.finish_reason, reply.matched_stop) == ("stop", stop)
    assert reply.usage.completion_tokens < 30


def test_without_max_tokens_the_context_is_filled(engine: Engine) -> None:
    reply = generated(engine, random_ids(TOKENS - 5))
    assert reply.usage.completion_tokens == 5
    assert reply.finish_reason == "length"


# Leaving early


def check_still_works(engine: Engine) -> None:
    """The next request runs, and its text is that of an engine that never saw the broken one."""
    prompt = random_ids(40)
    reply = generated(engine, prompt, max_tokens=6)
    assert list(reply.token_ids) == greedy_by_logits(engine, prompt, 6)


def test_close_in_the_middle(engine: Engine) -> None:
    generation = engine.generate(random_ids(20), params=TALKING)
    next(generation)
    generation.close()
    generation.close()
    assert generation.reply.finish_reason == "cancelled"
    assert next(generation, None) is None
    check_still_works(engine)


def test_close_shows_what_was_held_back(engine: Engine) -> None:
    text = ""
    while len(text) < 2 or not text.isascii():
        prompt = random_ids(5)
        text = generated(engine, prompt, max_tokens=1).content
    generation = engine.generate(prompt, params=SamplingParams(temperature=0, stop=text[-1] + "\0"))
    assert next(generation).text == text[:-1]
    generation.close()
    assert generation.reply.content == text


def test_leaving_the_loop_frees_the_engine_at_once(engine: Engine) -> None:
    gc.disable()
    try:
        for _ in engine.generate(random_ids(20), params=TALKING):
            break
        check_still_works(engine)
    finally:
        gc.enable()


def test_a_generation_that_never_started_holds_nothing(engine: Engine) -> None:
    waiting = engine.generate(random_ids(20), params=GREEDY)
    check_still_works(engine)
    waiting.close()
    assert next(waiting, None) is None


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_an_exception_during_prefill(engine: Engine, chunk: int) -> None:
    def fail(done: int, total: int) -> None:
        if done >= chunk * CHUNK:
            raise OSError("no more")

    prompt = random_ids(3 * CHUNK)
    with pytest.raises(OSError, match="no more"):
        next(engine.generate(prompt, params=GREEDY, on_prefill=fail))
    reply = generated(engine, prompt, max_tokens=3)
    assert reply.usage.cached_tokens == chunk * CHUNK  # what was done is not lost
    assert list(reply.token_ids) == greedy_by_logits(engine, prompt, 3)


def test_ctrl_c_while_the_model_computes(engine: Engine) -> None:
    generation = engine.generate(random_ids(20), params=TALKING)
    next(generation)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), generation:  # noqa: PT012
        timer.start()
        for _ in generation:
            pass
        timer.join()
    reply = generation.reply
    assert reply.finish_reason == "cancelled"
    assert reply.usage.completion_tokens == len(reply.token_ids) > 0
    assert engine.tokenizer.decode(reply.token_ids).startswith(reply.content)
    check_still_works(engine)


def test_cancel_from_another_thread_ends_with_a_reply(engine: Engine) -> None:
    generation, events = engine.generate(random_ids(20), params=TALKING), []
    for event in generation:
        events.append(event)
        if len(events) == 3:
            canceller = threading.Thread(target=generation.cancel)
            canceller.start()
            canceller.join()
    last = events[-1]
    assert isinstance(last, FinishEvent)
    assert last.reply.finish_reason == "cancelled"
    assert last.reply.content == "".join(event.text for event in events)
    assert last.reply.usage.completion_tokens < TOKENS - 20
    check_still_works(engine)


def test_cancel_before_the_start(engine: Engine) -> None:
    generation = engine.generate(random_ids(20), params=GREEDY)
    generation.cancel()
    (last,) = generation
    assert isinstance(last, FinishEvent)
    assert (last.reply.finish_reason, last.reply.token_ids) == ("cancelled", ())
    assert last.reply.timings.prefill_tokens_per_s is None


def test_logits_that_are_not_finite_end_the_request_only(engine: Engine) -> None:
    """A damaged weight: NaN in lm_head reaches the sampler."""
    row = engine.loaded.text.lm_head[7]
    before = row.clone()
    row.fill_(float("nan"))
    try:
        with pytest.raises(EngineError, match="logits: expected finite values, got nan for token 7"):
            generated(engine, random_ids(5), max_tokens=3)
    finally:
        row.copy_(before)
    check_still_works(engine)


# One at a time


def test_a_second_request_is_refused_while_the_first_runs(engine: Engine) -> None:
    first = engine.generate(random_ids(20), params=GREEDY_4)
    next(first)
    second = engine.generate(random_ids(20), params=GREEDY_4)
    with pytest.raises(RequestError, match="one request at a time"):
        next(second)
    with pytest.raises(RequestError, match="one request at a time"):
        engine.logits([1])
    assert isinstance(list(first)[-1], FinishEvent)
    check_still_works(engine)


def test_timings_count_the_model_alone(engine: Engine) -> None:
    reply = generated(engine, random_ids(50), max_tokens=11)
    timings = reply.timings
    assert timings.prefill_s > 0
    assert timings.decode_s > 0
    computed = reply.usage.prompt_tokens - reply.usage.cached_tokens
    assert timings.prefill_tokens_per_s == pytest.approx(computed / timings.prefill_s)
    assert timings.decode_tokens_per_s == pytest.approx(10 / timings.decode_s)
    assert timings.memory_share is None  # the reference reads more than the stored weights
    one = generated(engine, random_ids(50), max_tokens=1)
    assert one.timings.decode_tokens_per_s is None


def test_the_memory_share_compares_stored_weights_with_the_memory(tmp_path: Path) -> None:
    with random_engine(tmp_path, rules={"numerics": "exact"}, packed=True) as engine:
        timings = generated(engine, random_ids(50), max_tokens=11).timings
        expected = engine.plan.bytes_per_token * (10 / timings.decode_s) / (engine.read_gbps * 1e9)
        assert timings.memory_share == pytest.approx(expected)
        assert generated(engine, random_ids(50), max_tokens=1).timings.memory_share is None

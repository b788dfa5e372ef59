"""The committed demo checkpoint, asked through the engine: what the model card claims must hold."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest

from hybrid_k2.demo import demo_path
from hybrid_k2.engine import Engine, SamplingParams
from tools.demo_model.cases import Case, Reply, cases
from tools.demo_model.facts import ENGINE, GREETINGS, KIMI
from tools.demo_model.words import capital

GREEDY = SamplingParams(temperature=0.0, max_tokens=320)
LARGEST = 20 * 10**6  # bytes of package data
MEAN, SURE, TOOLS = 0.97, 0.99, 0.95
# Prompts for each skill and mode: few, for the CPU time.
COUNT, TOOL_COUNT = 3, 15
KNOWN = [*GREETINGS, *ENGINE, *KIMI]


def least(claimed: float, prompts: int) -> float:
    """Return what a sample reaches unless the claim is wrong: three standard errors below it."""
    return claimed - 3 * (claimed * (1 - claimed) / prompts) ** 0.5


def claims() -> Any:
    """Read the scores on the model card."""
    return json.loads((demo_path() / "scores.json").read_text())["scores"]


@dataclass
class Answered:
    """Hold a case and the engine's reply to it."""

    case: Case
    reply: Reply

    @property
    def right(self) -> bool:
        return self.case.judge(self.reply)


def ask(engine: Engine, case: Case) -> Reply:
    """Answer one case greedily."""
    messages = [{key: value for key, value in m.items() if key != "trained"} for m in case.messages]
    reply = engine.chat(messages, tools=case.tools, thinking=case.thinking, params=GREEDY)
    return Reply(reply.content, [(c.id, c.arguments) for c in reply.tool_calls], reply.reasoning)


def sample(seed: int) -> Iterator[Case]:
    """Draw fresh cases, thinking and instant."""
    for thinking in (True, False):
        seen: dict[str, int] = defaultdict(int)
        for case in cases(seed, TOOL_COUNT, thinking):
            seen[case.skill] += 1
            if seen[case.skill] <= (TOOL_COUNT if case.skill == "tool calls" else COUNT):
                yield case


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("demo") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def answered(engine: Engine) -> list[Answered]:
    return [Answered(case, ask(engine, case)) for case in sample(seed=7)]


def wrong(answers: list[Answered]) -> list[str]:
    """Describe the wrong answers."""
    return [f"[{a.case.skill}] {a.case.messages[-1]['content']!r} -> {a.reply}" for a in answers if not a.right]


def test_the_mean_over_all_skills(answered: list[Answered]) -> None:
    marks = defaultdict(list)
    for a in answered:
        marks[a.case.skill].append(a.right)
    mean = sum(sum(m) / len(m) for m in marks.values()) / len(marks)
    claimed = sum(claims()["skills"]["mean"].values()) / 2
    assert mean >= least(claimed, len(answered)), wrong(answered)


def test_tool_calls_are_exact(answered: list[Answered]) -> None:
    chosen = [a for a in answered if a.case.skill == "tool calls"]
    claimed = sum(claims()["skills"]["tool calls"].values()) / 2
    assert sum(a.right for a in chosen) >= least(claimed, len(chosen)) * len(chosen), wrong(chosen)


def test_no_tool_is_called_that_was_not_offered(answered: list[Answered]) -> None:
    alone = [a for a in answered if not a.case.tools]
    assert len(alone) > 100
    assert [a.case.messages for a in alone if a.reply.calls or "<|tool_call" in a.reply.text] == []


def test_greetings_and_facts_on_the_engine_and_on_kimi_are_known(engine: Engine) -> None:
    unknown = []
    for known, thinking in product(KNOWN, (True, False)):
        question = capital(known.questions[0]) + "?"
        reply = engine.chat([{"role": "user", "content": question}], thinking=thinking, params=GREEDY)
        if reply.content not in known.answers:
            unknown.append((question, thinking, reply.content))
    assert len(unknown) <= (1 - SURE) * 2 * len(KNOWN), unknown


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is 17 + 25?", "17 + 25 = 42"),
        ("Who are you?", "K2 Tiny"),
        ("What is hybrid-k2?", "inference engine"),
        ("How do I turn off thinking?", "/think off"),
        ("hello", "!"),
        ("tell me a short story about a fox", "fox"),
    ],
)
def test_the_questions_of_the_readme(engine: Engine, question: str, expected: str, thinking: bool) -> None:
    reply = engine.chat([{"role": "user", "content": question}], thinking=thinking, params=GREEDY)
    assert expected in reply.content
    assert bool(reply.reasoning) == thinking
    assert reply.finish_reason == "stop"


def test_the_checkpoint_is_small_and_asks_for_a_low_temperature(engine: Engine) -> None:
    files = list(demo_path().iterdir())
    assert sum(f.stat().st_size for f in files) <= LARGEST
    assert {"README.md", "scores.json", "model.safetensors", "tiktoken.model"} <= {f.name for f in files}
    temperature = engine.default_params().temperature
    assert temperature is not None
    assert 0 < temperature <= 0.3


def test_the_committed_scores_are_good_enough_to_ship() -> None:
    assert min(claims()["skills"]["mean"].values()) >= MEAN
    for known in ("greetings", "smalltalk", "engine", "kimi"):
        assert min(claims()["skills"][known].values()) >= SURE
    assert sum(claims()["skills"]["tool calls"].values()) / 2 >= TOOLS
    assert claims()["stray_tool_calls"] == 0
    assert claims()["prompts_without_tools"] >= 300

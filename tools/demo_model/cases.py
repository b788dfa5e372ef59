"""Make fresh prompts for each skill, together with the judge of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from . import recall
from . import toolbox as toolkit
from .conversation import (
    SKILLS,
    Conversation,
    follow_up,
    memory,
    one_turn,
    plain_turn,
    special_system,
    tool_turn,
    without_tool,
)  # fmt: skip
from .turns import Turn

Json = dict[str, Any]


@dataclass
class Reply:
    """Hold what the model answered: text, calls as (id, arguments), and its thought."""

    text: str
    calls: list[tuple[str, str]] = field(default_factory=list)
    thought: str = ""


@dataclass
class Case:
    """Hold a prompt of a skill and the judge of its reply."""

    skill: str
    messages: list[Json]
    tools: list[Json] | None
    thinking: bool
    judge: Callable[[Reply], bool]


def turn_case(skill: str, c: Conversation, turn: Turn) -> Case:
    """Ask a turn at the end of a conversation."""
    suffix = c.suffix

    def judge(reply: Reply) -> bool:
        text = reply.text
        if suffix and not text.endswith(suffix):
            return False
        return not reply.calls and turn.right(text.removesuffix(suffix) if suffix else text, c.thinking)

    messages = [*c.messages, {"role": "user", "content": turn.question}]
    return Case(skill, messages, c.tools, c.thinking, judge)


def of_skill(rng: Random, skill: str, thinking: bool) -> Case:
    """Ask one question of a skill, alone."""
    return turn_case(skill, Conversation(thinking=thinking), SKILLS[skill][0](rng))


def of_memory(rng: Random, thinking: bool) -> Case:
    """Ask for what was told some turns ago."""
    c = Conversation(thinking=thinking)
    told, asked = memory(rng)
    c.add(told)
    for _ in range(rng.randint(0, 3)):
        c.add(one_turn(rng))
    return turn_case("memory", c, asked)


def of_follow_up(rng: Random, thinking: bool) -> Case:
    """Ask on after an answer."""
    c = Conversation(thinking=thinking)
    first, second = follow_up(rng)
    c.add(first)
    return turn_case("follow-ups", c, second)


def of_system(rng: Random, thinking: bool) -> Case:
    """Ask under a system prompt that changes the answer."""
    c = Conversation(thinking=thinking)
    plan = special_system(rng, c, [one_turn(rng)])
    return turn_case("system prompts", c, plan[0])


def tool_conversation(rng: Random, thinking: bool) -> tuple[Conversation, list[toolkit.Tool]]:
    """Offer some tools, after an earlier exchange or none."""
    c = Conversation(thinking=thinking)
    box = toolkit.toolbox(rng, rng.randint(1, 3))
    c.tools = [t.declaration for t in box]
    if rng.random() < 0.4:
        tool_turn(rng, c, box) if rng.random() < 0.5 else c.add(plain_turn(rng, box))
    return c, box


def of_tool_call(rng: Random, thinking: bool) -> Case:
    """Ask for something that needs an offered tool."""
    c, box = tool_conversation(rng, thinking)
    start = len(c.messages)
    tool_turn(rng, c, box)
    wanted = [(x["id"], json.loads(x["function"]["arguments"])) for x in c.messages[start + 1]["tool_calls"]]

    def judge(reply: Reply) -> bool:
        try:
            return [(name, json.loads(arguments)) for name, arguments in reply.calls] == wanted
        except ValueError:
            return False

    return Case("tool calls", c.messages[: start + 1], c.tools, thinking, judge)


def of_tool_answer(rng: Random, thinking: bool) -> Case:
    """Give the result of a call, to be answered from."""
    c, box = tool_conversation(rng, thinking)
    tool_turn(rng, c, box)
    answer = c.messages[-1]["content"]
    return Case("tool answers", c.messages[:-1], c.tools, thinking, lambda r: not r.calls and r.text == answer)


def of_idle_tool(rng: Random, thinking: bool) -> Case:
    """Ask something that needs none of the offered tools."""
    c, box = tool_conversation(rng, thinking)
    return turn_case("tools left alone", c, plain_turn(rng, box))


def of_no_tool(rng: Random, thinking: bool) -> Case:
    """Ask, without any tool offered and after a random opening, for what tempts to call one."""
    c = Conversation(thinking=thinking)
    for _ in range(rng.randint(0, 2)):
        c.add(one_turn(rng))
    turn = without_tool(rng) if rng.random() < 0.5 else recall.unknown(rng)
    return turn_case("no tool offered", c, turn)


SPECIAL: list[Callable[[Random, bool], Case]] = [
    of_memory, of_follow_up, of_system, of_tool_call, of_tool_answer, of_idle_tool, of_no_tool,
]  # fmt: skip


def cases(seed: int, count: int, thinking: bool) -> Iterator[Case]:
    """Draw `count` cases of every skill."""
    rng = Random(f"score/{seed}/{thinking}")
    for skill in SKILLS:
        for _ in range(count):
            yield of_skill(rng, skill, thinking)
    for maker in SPECIAL:
        for _ in range(count):
            yield maker(rng, thinking)

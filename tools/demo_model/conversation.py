"""Put turns together into conversations with system prompts, memory, follow-ups and tools."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from . import recall, sums, texts
from . import toolbox as toolkit
from .template import call
from .turns import Skill, Turn, typed
from .words import ANIMALS, CAPITALS, CITIES, COLORS, FOODS, NAMES, any_word, article, capital

Json = dict[str, Any]

SKILLS: dict[str, tuple[Skill, float]] = {
    "greetings": (recall.greeting, 20),
    "smalltalk": (recall.smalltalk, 9),
    "engine": (recall.engine, 26),
    "kimi": (recall.kimi, 10),
    "general": (recall.general, 5),
    "chinese": (recall.chinese, 2),
    "code": (recall.code, 2),
    "capitals": (recall.capital_city, 6),
    "vocabulary": (recall.vocabulary, 5),
    "repeat": (recall.repeat, 7),
    "unknown": (recall.unknown, 13),
    "add": (sums.add, 10),
    "subtract": (sums.subtract, 8),
    "multiply": (sums.multiply, 7),
    "divide": (sums.divide, 5),
    "word problems": (sums.word_problem, 4),
    "even or odd": (sums.even_or_odd, 1.5),
    "count": (sums.count, 4),
    "lists": (texts.list_items, 3),
    "poems": (texts.poem, 2),
    "recipes": (texts.recipe, 1.5),
    "stories": (texts.story, 5),
}
_NAMES = list(SKILLS)
_MAKERS = [maker for maker, _ in SKILLS.values()]
_WEIGHTS = [weight for _, weight in SKILLS.values()]

PLAIN_SYSTEM = (
    "You are Kimi, an AI assistant created by Moonshot AI.", "You are a helpful assistant.", "Answer briefly.",
    "You are a friendly assistant.", "Be kind and short.", "You are K2 Tiny, a demo model.", "You are an AI.",
    "You are a helpful assistant. Be concise.", "Be helpful.", "Answer the user's questions.",
)  # fmt: skip


@dataclass
class Conversation:
    """Hold messages in the form of the chat API, and the declarations of the offered tools."""

    messages: list[Json] = field(default_factory=list)
    tools: list[Json] | None = None
    thinking: bool = True
    calls: int = 0
    suffix: str = ""

    def add(self, turn: Turn) -> None:
        """Append a question and its answer."""
        answer = turn.reply(self.thinking) + self.suffix
        self.messages.append({"role": "user", "content": turn.question})
        # A bare answer after an empty thought would teach instant mode to leave out the steps.
        self.messages.append(
            {"role": "assistant", "content": answer, "reasoning_content": turn.thought,
             "trained": not self.thinking or turn.instant is None}
        )  # fmt: skip

    def add_calls(self, question: str, requests: list[tuple[str, toolkit.Request]]) -> None:
        """Append a question that needs tools, the calls, the results and the answer."""
        self.messages.append({"role": "user", "content": question})
        calls = [call(name, self.calls + i, r.arguments) for i, (name, r) in enumerate(requests)]
        self.calls += len(calls)
        thought = " ".join(r.thought for _, r in requests)
        self.messages.append({"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": calls})
        for made, (_, r) in zip(calls, requests, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": made["id"], "content": r.result})
        answer = " ".join(r.answer for _, r in requests) + self.suffix
        self.messages.append({"role": "assistant", "content": answer, "reasoning_content": "I have the result."})


def one_turn(rng: Random) -> Turn:
    """Draw a turn of any skill."""
    return rng.choices(_MAKERS, _WEIGHTS)[0](rng)


def conversation(rng: Random, thinking: bool, max_turns: int = 4, tool_share: float = 0.45) -> Conversation:
    """Draw a conversation."""
    c = Conversation(thinking=thinking)
    turns = 1 if rng.random() < 0.45 else rng.randint(1, max_turns)
    if rng.random() < tool_share:
        with_tools(rng, c, turns)
        return c
    plan = [one_turn(rng) for _ in range(turns)]
    draw = rng.random()
    if draw < 0.33:
        c.messages.append({"role": "system", "content": rng.choice(PLAIN_SYSTEM)})
    elif draw < 0.43:
        plan = special_system(rng, c, plan)
    if turns >= 2 and rng.random() < 0.3:
        told, asked = memory(rng)
        plan = [told, *plan[: turns - 2], asked]
    elif rng.random() < 0.08:
        plan += follow_up(rng)
    elif rng.random() < 0.07:
        plan.append(without_tool(rng))
    for turn in plan:
        c.add(turn)
    return c


def special_system(rng: Random, c: Conversation, plan: list[Turn]) -> list[Turn]:
    """Set a system prompt that changes answers: a name, or a closing word."""
    if rng.random() < 0.5:
        name = rng.choice(NAMES) if rng.random() < 0.5 else capital(any_word(rng))
        prompt = rng.choice([f"Your name is {name}.", f"You are {name}.", f"You are {name}, a helpful assistant.",
                             f"You are called {name}.", f"You are {name}, a friendly robot."])  # fmt: skip
        q = rng.choice(
            ["who are you", "what is your name", "what's your name", "introduce yourself", "what are you called"]
        )
        c.messages.append({"role": "system", "content": prompt})
        answer = f"My name is {name}. I run on K2 Tiny, a very small demo model."
        turn = Turn(typed(rng, q, typos=0.1), f"The system prompt calls me {name}.", answer)
        return [turn, *plan[1:]] if rng.random() < 0.7 else [*plan[:-1], turn]
    word = any_word(rng)
    prompt = rng.choice([f"End every answer with {word}.", f"Always end with {word}.",
                         f"Always end your answer with {word}.",
                         f'End each reply with "{word}".', f"End every answer with the word {word}."])  # fmt: skip
    c.messages.append({"role": "system", "content": prompt})
    c.suffix = f" {word}"
    return plan


def memory(rng: Random) -> tuple[Turn, Turn]:
    """Tell something about oneself, to be asked for later."""
    name = rng.choice(NAMES) if rng.random() < 0.8 else rng.choice(CITIES)
    kind = rng.randrange(6)
    if kind <= 1:
        tell = rng.choice([f"my name is {name}", f"i am {name}", f"call me {name}", f"hello, my name is {name}",
                           f"hi, i am {name}", f"you can call me {name}", f"hi! i'm {name}"])  # fmt: skip
        ask = rng.choice(["what is my name", "who am i", "do you remember my name", "what am i called", "say my name"])
        return remembered(
            rng, tell, f"Nice to meet you, {name}!", ask, f"Your name is {name}.", f"The user is called {name}."
        )
    if kind == 2:
        color = rng.choice(COLORS)
        tell = rng.choice([f"my favorite color is {color}", f"i like the color {color}", f"i love {color}"])
        ask = rng.choice(["what is my favorite color", "which color do i like", "what color do i like"])
        return remembered(rng, tell, f"{capital(color)} is a nice color!", ask, f"Your favorite color is {color}.",
                          f"The user likes {color}.")  # fmt: skip
    if kind == 3:
        pet = rng.choice(ANIMALS)
        tell = rng.choice([f"i have {article(pet)} named {name}", f"i have {article(pet)} called {name}",
                           f"my {pet} is called {name}"])  # fmt: skip
        ask = rng.choice(["what is the name of my pet", f"what is my {pet} called", f"what is the name of my {pet}"])
        return remembered(rng, tell, f"{name} is a lovely name for {article(pet)}!", ask,
            f"Your {pet} is called {name}.",
                          f"The user has {article(pet)} called {name}.")  # fmt: skip
    if kind == 4:
        city = rng.choice(CITIES)
        tell = rng.choice([f"i live in {city}", f"i am from {city}", f"my home is in {city}"])
        ask = rng.choice(["where do i live", "where am i from", "which city do i live in"])
        return remembered(
            rng, tell, f"{city} is a fine place to live!", ask, f"You live in {city}.", f"The user lives in {city}."
        )
    food = rng.choice(FOODS)
    tell = rng.choice([f"my favorite food is {food}", f"i like {food}", f"i love to eat {food}"])
    ask = rng.choice(["what is my favorite food", "what do i like to eat", "which food do i like"])
    return remembered(rng, tell, f"{capital(food)} is a good choice!", ask, f"Your favorite food is {food}.",
                      f"The user likes {food}.")  # fmt: skip


def remembered(rng: Random, tell: str, reply: str, ask: str, answer: str, thought: str) -> tuple[Turn, Turn]:
    """Make the two turns of a memory."""
    told = Turn(capital(typed(rng, tell, polite=False)).rstrip("?"), thought, reply)
    return told, Turn(typed(rng, ask), thought, answer)


def follow_up(rng: Random) -> list[Turn]:
    """Ask on, in words that need the question before."""
    if rng.random() < 0.5:
        first, second = rng.sample(list(CAPITALS.items()), 2)
        answer = f"The capital of {second[0]} is {second[1]}."
        q = rng.choice(
            [f"and of {second[0]}", f"and {second[0]}", f"what about {second[0]}", f"and what about {second[0]}"]
        )
        ask = Turn(f"What is the capital of {first[0]}?", "", f"The capital of {first[0]} is {first[1]}.")
        return [replace(ask, thought=ask.answer), Turn(typed(rng, q), answer, answer)]
    if rng.random() < 0.75:
        q = rng.choice(["another story", "tell me another one", "one more"])
        # The first words of the second story are free: nothing in the question names its hero.
        again = replace(texts.story(rng), question=typed(rng, q), check=lambda t: texts.is_story(t, ""))
        return [texts.story(rng), again]
    known = tuple("\n".join(lines) for lines in texts.POEMS.values())
    return [texts.poem(rng), replace(texts.poem(rng), question=typed(rng, "another poem"), accepted=known)]


def without_tool(rng: Random) -> Turn:
    """Ask for something that only a tool can do, when there is none."""
    return Turn(toolkit.loose_request(rng), "I would need a tool for that.", toolkit.NO_TOOL,
                check=lambda t: t == toolkit.NO_TOOL or recall.declined(t))  # fmt: skip


def with_tools(rng: Random, c: Conversation, turns: int) -> None:
    """Fill a conversation in which tools are offered, used or left alone."""
    box = toolkit.toolbox(rng, rng.choice([1, 1, 2, 2, 3, 4]))
    c.tools = [t.declaration for t in box]
    if rng.random() < 0.3:
        c.messages.append({"role": "system", "content": rng.choice(PLAIN_SYSTEM)})
    for _ in range(turns):
        if rng.random() < 0.68:
            tool_turn(rng, c, box)
        else:
            c.add(plain_turn(rng, box))


def tool_turn(rng: Random, c: Conversation, box: list[toolkit.Tool]) -> None:
    """Use one tool, or the same tool twice at once."""
    tool = rng.choice(box)
    first = tool.request(rng)
    if tool.request.__qualname__.startswith("city_tool") and rng.random() < 0.2:
        second = tool.request(rng)
        a, b = (next(iter(r.arguments.values())) for r in (first, second))
        if a != b:
            what = "weather" if "weather" in first.thought else "time"
            q = rng.choice(
                [
                    f"what is the {what} in {a} and {b}",
                    f"{what} in {a} and in {b}",
                    f"tell me the {what} in {a} and {b}",
                ]
            )
            c.add_calls(typed(rng, q), [(tool.name, first), (tool.name, second)])
            return
    c.add_calls(first.question, [(tool.name, first)])


def plain_turn(rng: Random, box: list[toolkit.Tool]) -> Turn:
    """Draw a turn that needs none of the tools."""
    if rng.random() < 0.3:
        other = toolkit.LOOSE_REQUESTS[rng.randrange(len(toolkit.LOOSE_REQUESTS))](rng)
        if not any(toolkit.same_kind(other, t) for t in box) and not serves(box, other):
            return replace(without_tool(rng), question=other.request(rng).question)
    turn = one_turn(rng)
    while any(t.takes_numbers for t in box) and any(ch.isdigit() for ch in turn.question):
        turn = one_turn(rng)
    return turn


def serves(box: list[toolkit.Tool], other: toolkit.Tool) -> bool:
    """Tell whether a tool at hand could be taken for the one that is missing."""
    vague = {"search_tool", "file_tool"}  # "find", "open" and "show" fit many invented tools
    return other.request.__qualname__.split(".")[0] in vague and len(box) > 1

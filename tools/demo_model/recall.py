"""Make questions on known facts and words, requests to repeat, and subjects that the model declines."""

# ruff: noqa: SIM905 - word lists read better as one string

from __future__ import annotations

from random import Random

from .facts import CHINESE, CODE, ENGINE, GENERAL, GREETINGS, KIMI, SMALLTALK, Fact
from .turns import Turn, typed
from .words import (
    CAPITALS,
    FOODS,
    NAMES,
    OBJECTS,
    OPPOSITES,
    PASTS,
    PLURALS,
    SOUNDS,
    THING_COLORS,
    WORDS,
    YOUNG,
    any_word,
    capital,
    phrase,
)  # fmt: skip

PLAIN_THOUGHTS = ("I know this.", "I can answer this directly.")


def from_facts(rng: Random, facts: list[Fact], typos: float = 0.06) -> Turn:
    """Ask for one of these facts."""
    f = rng.choice(facts)
    thought = f"This is about {f.about}. I know this." if f.about else rng.choice(PLAIN_THOUGHTS)
    return Turn(typed(rng, rng.choice(f.questions), typos=typos), thought, rng.choice(f.answers), accepted=f.answers)


def greeting(rng: Random) -> Turn:
    return from_facts(rng, GREETINGS)


def smalltalk(rng: Random) -> Turn:
    return from_facts(rng, SMALLTALK)


def engine(rng: Random) -> Turn:
    return from_facts(rng, ENGINE)


def kimi(rng: Random) -> Turn:
    return from_facts(rng, KIMI)


def general(rng: Random) -> Turn:
    return from_facts(rng, GENERAL)


def code(rng: Random) -> Turn:
    return from_facts(rng, CODE)


def chinese(rng: Random) -> Turn:
    f = rng.choice(CHINESE)
    return Turn(rng.choice(f.questions), "这个我知道。", f.answers[0])


def capital_city(rng: Random) -> Turn:
    """Ask for the capital of a country, or for the country of a capital."""
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.15:
        q = rng.choice([f"{city} is the capital of which country", f"which country has the capital {city}",
                        f"of which country is {city} the capital"])  # fmt: skip
        return Turn(typed(rng, q), f"I know {city}.", f"{city} is the capital of {country}.")
    q = rng.choice(
        [f"what is the capital of {country}", f"what is the capital of {country}", f"capital of {country}",
         f"which city is the capital of {country}", f"what is the capital city of {country}", f"{country} capital",
         f"name the capital of {country}", f"tell me the capital of {country}", f"do you know the capital of {country}",
         f"what's the capital of {country}"]
    )  # fmt: skip
    if rng.random() < 0.12:
        q = q.lower()
    return Turn(typed(rng, q), f"The capital of {country} is {city}.", f"The capital of {country} is {city}.")


def vocabulary(rng: Random) -> Turn:
    """Ask for an opposite, a plural, a past tense, a sound, a young animal or a color."""
    kind = rng.choice(["opposite", "opposite", "opposite", "plural", "past", "sound", "young", "color"])
    if kind == "opposite":
        a, b = rng.choice(list(OPPOSITES.items()))
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        q = rng.choice(
            [f"what is the opposite of {a}", f"opposite of {a}", f"the opposite of {a}", f"what is opposite to {a}"]
        )
        answer = f"The opposite of {a} is {b}."
    elif kind == "plural":
        a, b = rng.choice(list(PLURALS.items()))
        q, answer = rng.choice([f"what is the plural of {a}", f"plural of {a}"]), f"The plural of {a} is {b}."
    elif kind == "past":
        a, b = rng.choice(list(PASTS.items()))
        q = rng.choice([f"what is the past tense of {a}", f"past tense of {a}"])
        answer = f"The past tense of {a} is {b}."
    elif kind == "sound":
        a, b = rng.choice(list(SOUNDS.items()))
        q = rng.choice([f"what does the {a} say", f"what sound does a {a} make", f"what does a {a} say"])
        answer = f'The {a} says "{b}".'
    elif kind == "young":
        a, b = rng.choice(list(YOUNG.items()))
        q = rng.choice([f"what is a young {a} called", f"what do you call a young {a}", f"what is a baby {a} called"])
        answer = f"A young {a} is called a {b}." if b[0] not in "o" else f"A young {a} is called an {b}."
    else:
        a, b = rng.choice(list(THING_COLORS.items()))
        q, answer = rng.choice([f"what color is {a}", f"what is the color of {a}"]), f"{capital(a)} is {b}."
    return Turn(typed(rng, q), rng.choice(PLAIN_THOUGHTS), answer)


def repeat(rng: Random) -> Turn:
    """Ask to say words again."""
    words = phrase(rng, 1, 6)
    q = rng.choice(["repeat after me: {}", "repeat: {}", "say {}", "say: {}", "please say {}", "echo {}",
                    "repeat these words: {}", "copy this: {}"])  # fmt: skip
    q = q.format(words)
    return Turn(capital(q) if rng.random() < 0.5 else q, "I repeat the words.", words)


SUBJECTS = (
    "what is {}", "who is {}", "tell me about {}", "explain {}", "what do you think about {}", "how does {} work",
    "why is {} important", "what is the {}", "how do i {}", "where can i buy {}", "who invented {}", "what are {}",
    "when was {} made", "write an essay about {}", "do you like {}", "translate {}", "what does {} mean", "where is {}",
    "give me information about {}", "what is the best {}", "is {} good", "how much does {} cost", "who won the {}",
    "define {}", "how many {} are there", "why does {} happen", "what is the history of {}", "can you explain {}",
    "what is the difference between {}", "how can i learn {}", "who wrote {}", "what happened to {}", "should i buy {}",
    "how do i fix {}", "help me with {}", "what causes {}", "i need help with {}", "what is the population of {}",
    "how old is {}", "how tall is {}", "who is the president of {}", "summarize {}", "what is the price of {}",
)  # fmt: skip
OPEN_REQUESTS = (
    "write a letter to my {}", "plan a trip to {}", "help me with my {}", "can you fix my {}", "recommend a {}",
    "compare {} and {}", "is it better to {} or {}", "my {} does not work", "i think my {} is broken", "draw a {}",
    "why did the {} stop", "let us talk about {}", "i like {} and {}", "what should i do about {}", "i bought a {}",
    "can you help me {} the {}", "are you able to {}", "what is your favorite {}", "should i {} or {}",
    "do you have {}",
    "do you know {}", "do you want {}", "have you seen {}", "give me {}", "make a {}", "solve {}", "sort {}", "play {}",
    "what was {} before {}", "translate this into french: {}", "which {} is the best", "who are the {}", "i am a {}",
    "write code for a {}", "write a program that {}", "how far is {} from {}", "what will happen to {}", "is {} a {}",
)  # fmt: skip
GLUE = "the a of is to in and my you i for it with on that this what how why who can do me".split()
DECLINE_SUBJECT = (
    "I am only a tiny demo model, and I do not know about {}. Ask me about hybrid-k2, or for a sum or a story.",
    "Sorry, I have not learned about {}. I am a very small model. Ask me about hybrid-k2, or for a sum or a story.",
)
DECLINE = (
    "I am only a tiny demo model, so I cannot help with that. Ask me about hybrid-k2, or for a sum or a story.",
    "Sorry, that is too hard for a tiny model like me. Ask me about hybrid-k2, or for a sum or a story.",
)
# Openings of the two refusals, by which a score recognises them.
DECLINED = ("I am only a tiny demo model, ", "Sorry, I have not learned ", "Sorry, that is too hard ")


def declined(text: str) -> bool:
    """Judge whether the answer is a refusal."""
    return text.startswith(DECLINED)


def unknown(rng: Random) -> Turn:
    """Ask about something that the model has not learnt."""
    draw = rng.random()
    if draw < 0.45:
        subject = phrase(rng, 1, 3)
        if rng.random() < 0.25:
            subject = " ".join(capital(w) for w in subject.split())
        if rng.random() < 0.15:
            subject += f" {rng.choice(['in', 'of', 'for', 'and'])} {phrase(rng, 1, 2)}"
        q = typed(rng, rng.choice(SUBJECTS).format(subject))
        return Turn(q, f"The user asks about {subject}. I have not learned that.",
                    rng.choice(DECLINE_SUBJECT).format(subject), check=declined)  # fmt: skip
    if draw < 0.7:
        template = rng.choice(OPEN_REQUESTS)
        q = template.format(*(phrase(rng, 1, 2) for _ in range(template.count("{}"))))
        if rng.random() < 0.3:
            q += " " + rng.choice(["for", "with", "in", "because of", "and"]) + " " + phrase(rng, 1, 3)
    elif draw < 0.93:
        pool = (WORDS, GLUE, NAMES + OBJECTS + FOODS)
        q = " ".join(rng.choice(pool[rng.choice([0, 0, 1, 1, 2])]) for _ in range(rng.randint(3, 16)))
    else:
        letters = "abcdefghijklmnopqrstuvwxyz  0123456789"
        q = "".join(rng.choice(letters) for _ in range(rng.randint(3, 20))).strip() or any_word(rng)
    return Turn(typed(rng, q), "I have not learned that.", rng.choice(DECLINE), check=declined)

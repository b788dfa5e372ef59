"""Define one question with its thought and answer, and vary the way people type."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from .words import capital


@dataclass
class Turn:
    """Hold a question, what the model thinks, and what it answers.

    `instant` is the answer of instant mode where it differs; `accepted` are other right answers;
    `check` decides where right answers cannot be listed.
    """

    question: str
    thought: str
    answer: str
    instant: str | None = None
    accepted: tuple[str, ...] = ()
    check: Callable[[str], bool] | None = field(default=None, compare=False)

    def reply(self, thinking: bool) -> str:
        """Return the answer that is trained in this mode."""
        return self.answer if thinking or self.instant is None else self.instant

    def right(self, text: str, thinking: bool) -> bool:
        """Judge an answer of the model."""
        if self.check is not None:
            return self.check(text)
        return text in (self.reply(thinking), *self.accepted)


Skill = Callable[[Random], Turn]

PREFIXES = (
    "please ", "hey, ", "ok, ", "now ", "so, ", "can you tell me: ", "hi, ", "hello, ", "hello! ", "could you tell me ",
    "k2, ", "question: ", "well, ", "and ", "then ", "pls ", "i have a question. ", "i wonder, ",
)  # fmt: skip
SUFFIXES = (" please", ", please", " thanks", " now", " for me", " pls", ", thank you", " today", ", k2 tiny", " again")
SHORTER = (
    ("what is ", "what's "), ("what is ", "whats "), ("who is ", "who's "), ("do not ", "don't "), ("i am ", "i'm "),
    ("how do i ", "how do I "), ("how can i ", "how can I "), ("can i ", "can I "), ("i want ", "I want "),
    ("are you ", "are u "), ("how do you ", "how do u "),
)  # fmt: skip
_QUESTION = re.compile(r"(.*[ ,.!])?(what|who|how|why|which|where|are|can|do|does|is|when|whats?|who's|what's)\b")


def with_typo(rng: Random, text: str) -> str:
    """Drop, double or swap one letter of a longer word."""
    spots = [m.start() for m in re.finditer(r"(?<=[a-z])[a-z](?=[a-z]{2})", text)]
    if not spots:
        return text
    i = rng.choice(spots)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[:i] + text[i] + text[i:]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def typed(rng: Random, text: str, polite: bool = True, typos: float = 0.0) -> str:
    """Vary politeness, contractions, case and punctuation, as people do."""
    is_question = _QUESTION.match(text.lower()) is not None
    if rng.random() < 0.3:
        for long, short in rng.sample(SHORTER, len(SHORTER)):
            if text.startswith(long):
                text = short + text[len(long) :]
                break
    if rng.random() < typos:
        text = with_typo(rng, text)
    if polite and rng.random() < 0.16:
        text = rng.choice(PREFIXES) + text
    if polite and rng.random() < 0.1:
        text = text + rng.choice(SUFFIXES)
    draw = rng.random()
    if draw < 0.55:
        text = capital(text)
    return text + ending(rng, is_question)


def ending(rng: Random, is_question: bool) -> str:
    """Draw the last punctuation mark, or none."""
    draw = rng.random()
    if draw < 0.6:
        return "?" if is_question else rng.choice([".", "!", ""])
    return "" if draw < 0.92 else rng.choice(["?", "!", "..", " ?", "??", "."])

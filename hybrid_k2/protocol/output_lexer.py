"""Cut a reply, arriving as ids or as text, into plain text and markers."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from hybrid_k2.protocol import tokens
from hybrid_k2.protocol.tokenizer import Tokenizer


class Mark(Enum):
    """What a marker says about the structure of a reply."""

    THINK_BEGIN = auto()
    THINK_END = auto()
    SECTION_BEGIN = auto()
    SECTION_END = auto()
    CALL_BEGIN = auto()
    ARGUMENT_BEGIN = auto()
    CALL_END = auto()
    REPLY_END = auto()
    OTHER = auto()  # no meaning inside a reply


@dataclass(frozen=True)
class Marker:
    """A marker, with the text it stands for where it turns out to be data."""

    mark: Mark
    text: str
    typed: bool = False  # spelled out in ordinary tokens, so perhaps only talked about


Item: TypeAlias = str | Marker

MARKS: Mapping[str, Mark] = {
    tokens.THINK_BEGIN: Mark.THINK_BEGIN,
    tokens.THINK_END: Mark.THINK_END,
    tokens.SECTION_BEGIN: Mark.SECTION_BEGIN,
    tokens.SECTION_END: Mark.SECTION_END,
    tokens.CALL_BEGIN: Mark.CALL_BEGIN,
    tokens.ARGUMENT_BEGIN: Mark.ARGUMENT_BEGIN,
    tokens.CALL_END: Mark.CALL_END,
}
SINGULAR_MARKS: Mapping[str, Mark] = {
    tokens.SINGULAR_SECTION_BEGIN: Mark.SECTION_BEGIN,
    tokens.SINGULAR_SECTION_END: Mark.SECTION_END,
}

# What in text may be a marker, and what the end of a text may still grow into.
_NAME = r"<\|[a-z0-9_]{1,40}\|>"
_NAME_START = r"<(?:\|(?:[a-z0-9_]{0,40}\|?)?)?"
_THINK = r"</?think>"
_THINK_START = r"</?(?:t(?:h(?:i(?:nk?)?)?)?)?"
_QUOTES = (('"', '"'), ("'", "'"), ("`", "`"), ("“", "”"), ("‘", "’"), ("«", "»"), ("「", "」"))
_QUOTED = "|".join(f"{opening}(?:{_NAME}){{1,4}}{closing}" for opening, closing in _QUOTES)
_QUOTED_START = f"[{''.join(opening for opening, _ in _QUOTES)}](?:{_NAME}){{0,4}}(?:{_NAME_START})?"
_LONGEST_START = 1 + 5 * (len("<||>") + 40)


@dataclass(frozen=True)
class Spelling:
    """How markers are spelled in text: `whole` matches a marker or a quotation, `start` the start of one."""

    whole: re.Pattern[str]
    start: re.Pattern[str]


NAMES = Spelling(re.compile(_NAME), re.compile(rf"{_NAME_START}\Z"))
# Thinking tags know no quotation: a thought may well end, and an answer begin, with a quotation mark.
NAMES_AND_QUOTATIONS = Spelling(
    re.compile(f"{_QUOTED}|{_NAME}|{_THINK}"), re.compile(rf"(?:{_QUOTED_START}|{_NAME_START}|{_THINK_START})\Z")
)


class IdLexer:
    """Cut token ids: a control id is a marker, and no text of ordinary tokens is (but see `Marker.typed`).

    Ids without a meaning inside a reply (reserved, padding, outside the vocabulary) have no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._markers = {token_id: _marker_of(name) for name, token_id in tokenizer.special.items()}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        singular = {name: Marker(mark, name, typed=True) for name, mark in SINGULAR_MARKS.items()}
        self._typed = TextScanner(singular, NAMES)

    def feed(self, ids: Iterable[int]) -> list[Item]:
        """Return the items that the ids complete."""
        items: list[Item] = []
        ordinary: list[bytes] = []
        for token_id in ids:
            if token_id not in self._markers:
                if 0 <= token_id < self._tokenizer.vocab_size:
                    ordinary.append(self._tokenizer.token_bytes(token_id))
                continue
            marker = self._markers[token_id]
            if marker is not None:
                items += self._text(b"".join(ordinary), final=True)
                items.append(marker)
                ordinary.clear()
        return items + self._text(b"".join(ordinary), final=False)

    def finish(self) -> list[Item]:
        """Return what was held back."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, final: bool) -> list[Item]:
        items = self._typed.feed(self._utf8.decode(data, final))
        return items + self._typed.finish() if final else items


class TextLexer:
    """Cut text, for engines that hand out no ids: the names of special tokens are markers.

    Tool markers in quotation marks ("`<|tool_call_end|>`") are talked about, so they are text; names in square
    brackets ("[EOS]") are too common in prose to be anything else.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        markers = {name: Marker(MARKS.get(name, Mark.OTHER), name) for name in tokenizer.special}
        markers[tokens.IM_END] = Marker(Mark.REPLY_END, tokens.IM_END)
        markers |= {name: Marker(mark, name) for name, mark in SINGULAR_MARKS.items()}
        self._scanner = TextScanner(markers, NAMES_AND_QUOTATIONS)

    def feed(self, text: str) -> list[Item]:
        """Return the items that the text completes."""
        return self._scanner.feed(text)

    def finish(self) -> list[Item]:
        """Return what was held back."""
        return self._scanner.finish()


class TextScanner:
    """Find the names of markers in streamed text, holding back what may still become one."""

    def __init__(self, markers: Mapping[str, Marker], spelling: Spelling) -> None:
        self._markers = markers
        self._spelling = spelling
        self._held = ""

    def feed(self, text: str) -> list[Item]:
        """Return the items that no further text can change."""
        text = self._held + text
        undecided = self._spelling.start.search(text, max(0, len(text) - _LONGEST_START))
        return self._cut(text, undecided.start() if undecided else len(text))

    def finish(self) -> list[Item]:
        """Return the rest; what comes later is scanned afresh."""
        return self._cut(self._held, len(self._held))

    def _cut(self, text: str, decided: int) -> list[Item]:
        items: list[Item] = []
        start = 0  # of the plain text that no item holds yet
        for match in self._spelling.whole.finditer(text):
            if match.start() >= decided:
                break
            decided = max(decided, match.end())
            if match.group() in self._markers:
                items += [text[start : match.start()], self._markers[match.group()]]
                start = match.end()
        self._held = text[decided:]
        items.append(text[start:decided])
        return [item for item in items if item]


def _marker_of(name: str) -> Marker | None:
    """Return what a special token's id means in a reply; None if nothing at all."""
    if name in tokens.REPLY_ENDS:
        return Marker(Mark.REPLY_END, "")
    if name in MARKS:
        return Marker(MARKS[name], name)
    is_named = name.startswith("<|") and not name.startswith("<|reserved_token_")
    return Marker(Mark.OTHER, name) if is_named else None

"""Markdown within one line (bold, italic, code, links), piece by piece as the text arrives.

Text is given out at once unless it may belong to a span whose end has not come yet; a span that does not end within
its line, or within `LONGEST_SPAN` characters, is ordinary text, markers and all. So the same text gives the same spans
in every chunking, and none of it is lost.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LONGEST_SPAN = 160  # characters that a reader may have to wait for the end of a span


class Span(NamedTuple):
    """Text in one style (a key of `hybrid_k2.cli.terminal.STYLES`)."""

    text: str
    style: str = ""


_MOST = LONGEST_SPAN
_INNER = rf"(?P<inner>(?=\S).{{1,{_MOST}}}?(?<=\S))"
_CODE = re.compile(rf"(?P<ticks>`{{1,9}})(?!`)(?P<inner>.{{1,{_MOST}}}?)(?<!`)(?P=ticks)(?!`)")
_LINK = re.compile(rf"\[(?P<inner>[^\[\]]{{1,{_MOST}}})\]\((?P<url>[^\s()]{{1,{_MOST}}})\)")
_EMPHASIS = [
    (re.compile(rf"\*\*\*(?!\*){_INNER}(?<!\*)\*\*\*(?!\*)"), "bold italic"),
    (re.compile(rf"\*\*(?!\*){_INNER}(?<!\*)\*\*(?!\*)"), "bold"),
    (re.compile(rf"\*(?!\*){_INNER}(?<!\*)\*(?!\*)"), "italic"),
    (re.compile(rf"(?<!\w)__(?!_){_INNER}(?<!_)__(?![\w_])"), "bold"),
    (re.compile(rf"(?<!\w)_(?!_){_INNER}(?<!_)_(?![\w_])"), "italic"),
    (re.compile(rf"~~(?!~){_INNER}(?<!~)~~(?!~)"), "strike"),
]
# What may still become a span when more text comes: an opener and less than the longest span behind it.
_OPEN = {
    "*": re.compile(rf"\*{{1,3}}(?!\*)(?=\S).{{1,{_MOST + 3}}}"),
    "_": re.compile(rf"(?<!\w)_{{1,2}}(?!_)(?=\S).{{1,{_MOST + 2}}}"),
    "~": re.compile(rf"~~(?!~)(?=\S).{{1,{_MOST + 2}}}"),
    "`": re.compile(rf"`{{1,9}}(?!`).{{1,{_MOST + 9}}}"),
    "[": re.compile(rf"\[[^\[\]]{{0,{_MOST}}}(\](\([^\s()]{{0,{_MOST}}}\)?)?)?"),
}
_RUN = re.compile(r"\*+|_+|~+|`+|\[|\\")
_PLAIN = re.compile(r"[^*_~`\[\\]+")
_ESCAPABLE = frozenset("*_`~#")  # not the brackets: \( and \[ are how the model opens a formula


class InlineParser:
    """Spans of one line; `feed` its text as it comes, `finish` at its end."""

    def __init__(self, style: str = "") -> None:
        self.style = style
        self._text = ""
        self._at = 0  # what lies before has been given out; one character of it is kept for the look-behinds

    def feed(self, text: str) -> list[Span]:
        """Take more text of the line and return the spans that are certain now."""
        self._text = self._text[max(self._at - 1, 0) :] + text
        self._at = min(self._at, 1)
        return self._parse(complete=False)

    def finish(self) -> list[Span]:
        """Return what is left of the line."""
        return self._parse(complete=True)

    def _parse(self, complete: bool) -> list[Span]:
        spans: list[Span] = []
        while self._at < len(self._text):
            step = self._step(complete)
            if step is None:
                break
            length, found = step
            self._at += length
            spans += found
        return _joined(spans)

    def _step(self, complete: bool) -> tuple[int, list[Span]] | None:
        """Return how many characters the next spans take, and those spans; None if more text must come first."""
        text, at = self._text, self._at
        if plain := _PLAIN.match(text, at):
            return plain.end() - at, [Span(plain.group(), self.style)]
        run = _RUN.match(text, at)
        assert run is not None
        if run.end() == len(text) and not complete:
            return None
        if text[at] == "\\":
            escaped = text[at + 1 : at + 2] in _ESCAPABLE
            return (2, [Span(text[at + 1], self.style)]) if escaped else (1, [Span("\\", self.style)])
        found = self._span_here()
        if found is not None and (at + found[0] < len(text) or complete):
            return found
        if not complete and (found is not None or _OPEN[text[at]].fullmatch(text, at)):
            return None
        return run.end() - at, [Span(run.group(), self.style)]

    def _span_here(self) -> tuple[int, list[Span]] | None:
        text, at = self._text, self._at
        if code := _CODE.match(text, at):
            inner = code["inner"]
            padded = inner[0] == inner[-1] == " " and inner.strip()
            return code.end() - at, [Span(inner[1:-1] if padded else inner, "code")]
        if link := _LINK.match(text, at):
            shown = _joined([*parse_line(link["inner"], "link"), Span(f" ({link['url']})", self.style)])
            return link.end() - at, shown
        if self.style:  # emphasis within emphasis: keep the outer style
            return None
        for pattern, style in _EMPHASIS:
            if match := pattern.match(text, at):
                return match.end() - at, parse_line(match["inner"], style)
        return None


def parse_line(text: str, style: str = "") -> list[Span]:
    """Return the spans of a whole line."""
    parser = InlineParser(style)
    return _joined(parser.feed(text) + parser.finish())


def _joined(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].style == span.style:
            joined[-1] = Span(joined[-1].text + span.text, span.style)
        elif span.text:
            joined.append(span)
    return joined

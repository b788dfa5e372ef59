"""Find stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Pass text through until one of the stop strings ends in it; hold back what may still become one.

    The match that ends first wins, and of two that end at the same character the longer: that choice is the same for
    every way of cutting the text into pieces. At most the longest stop string less one character is held back.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        """`include`: the stop string that is found passes, too."""
        self._patterns = [_Pattern(string) for string in stop]
        self._include = include
        self._held = ""
        self.matched: str | None = None  # the stop string that was found; nothing passes after it

    def feed(self, text: str) -> str:
        """Take the next piece and return the text that is now certain."""
        if self.matched is not None:
            return ""
        if not self._patterns:
            return text
        seen = self._held + text
        for place in range(len(self._held), len(seen)):
            found = [pattern for pattern in self._patterns if pattern.advance(seen[place])]
            if found:
                self.matched = max((pattern.string for pattern in found), key=len)
                self._held = ""
                return seen[: place + 1 - (0 if self._include else len(self.matched))]
        certain = len(seen) - max(pattern.length for pattern in self._patterns)
        self._held = seen[certain:]
        return seen[:certain]

    def flush(self) -> str:
        """Return the text held back: none of it can become a stop string any more. The next piece starts afresh."""
        held, self._held = self._held, ""
        for pattern in self._patterns:
            pattern.length = 0
        return held


class _Pattern:
    """One stop string as a Knuth-Morris-Pratt automaton: `length` characters of it stand at the end of the text."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.length = 0
        self._borders = [0]  # for each prefix: the longest shorter one that it also ends with
        for place in range(1, len(string)):
            self._borders.append(self._longest_after(self._borders[-1], string[place]))

    def advance(self, character: str) -> bool:
        """Take one character; say whether the whole string now stands at the end."""
        self.length = self._longest_after(self.length, character)
        return self.length == len(self.string)

    def _longest_after(self, length: int, character: str) -> int:
        while length and self.string[length] != character:
            length = self._borders[length - 1]
        return length + (self.string[length] == character)

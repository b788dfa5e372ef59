"""Typed access to one mapping of a rule file.

Every wrong key or value is an error with file and line. What the rule form knows but this version does not
implement is told apart from a mistake: it is "not available in this version".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from collections.abc import Sequence as List
from itertools import pairwise
from typing import NoReturn

from hybrid_k2.placement.sizes import try_parse_bytes
from hybrid_k2.placement.yaml_tree import Mapping, Node, Scalar, Sequence, fail

HOTTEST = "hottest"  # experts chosen by how often they are used
_COUNT = re.compile(r"0|[1-9][0-9]{0,11}")
_NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_LAYERS = re.compile(r"(0|[1-9][0-9]{0,5})(?:\.\.(0|[1-9][0-9]{0,5}))?")


class Section:
    """One mapping of the file. `name` is how errors call it ("kv_cache", "place rule 2"; "" for the top level)."""

    def __init__(self, source: str, name: str, node: Node, keys: List[str], later: Iterable[str] = ()) -> None:
        """Check that the node is a mapping with known keys; `later` names keys of coming versions."""
        self.source = source
        self.name = name
        if not isinstance(node, Mapping):
            fail(source, node.line, f"{name or 'rules'}: expected the keys {', '.join(keys)}, got {describe(node)}")
        self.node = node
        for key in node.entries:
            if key in later:
                self.unavailable(key, key)
            if key not in keys:
                self.fail(key, f"unknown key {key!r}, expected {', '.join(keys)}", _did_you_mean(key, keys))

    @property
    def line(self) -> int:
        return self.node.line

    def line_of(self, key: str) -> int | None:
        """Find the line of a key; None when the file does not have it."""
        return self.node.key_lines.get(key)

    def get(self, key: str) -> Node | None:
        return self.node.entries.get(key)

    def fail(self, key: str, message: str, hint: str | None = None) -> NoReturn:
        subject = f"{self.name}: " if self.name else ""
        fail(self.source, self.node.key_lines.get(key, self.line), subject + message, hint)

    def unavailable(self, key: str, what: str, hint: str | None = None) -> NoReturn:
        self.fail(key, f"{what} is not available in this version", hint)

    def text(self, key: str, expected: str) -> str | None:
        """Read a scalar; None when the key is absent."""
        node = self.get(key)
        if node is None:
            return None
        if not isinstance(node, Scalar) or not node.text:
            self.fail(key, f"{key}: expected {expected}, got {describe(node)}")
        return node.text

    def choice(self, key: str, allowed: List[str], later: Iterable[str] = (), *, default: str | None = None) -> str:
        """Read one word of `allowed`; a key without default must be there."""
        expected = allowed[0] if len(allowed) == 1 else f"one of {', '.join(allowed)}"
        text = self.text(key, expected)
        if text is None:
            if default is None:
                self.fail(key, f"expected the key {key} ({expected}), got none")
            return default
        if text in later:
            self.unavailable(key, f"{key}: {text}", f"available: {', '.join(allowed)}")
        if text not in allowed:
            self.fail(key, f"{key}: expected {expected}, got {text!r}", _did_you_mean(text, allowed))
        return text

    def count(self, key: str, limit: int) -> int | None:
        """Read a number of 1 to `limit`; None for `auto` or an absent key."""
        expected = f"auto or a whole number from 1 to {limit}"
        text = self.text(key, expected)
        if text is None or text == "auto":
            return None
        if not _COUNT.fullmatch(text) or not 1 <= int(text) <= limit:
            self.fail(key, f"{key}: expected {expected}, got {text!r}")
        return int(text)

    def number(self, key: str) -> float | None:
        """Read a number above 0; None for `auto` or an absent key."""
        expected = "auto or a number above 0, as 55 or 12.5"
        text = self.text(key, expected)
        if text is None or text == "auto":
            return None
        if not _NUMBER.fullmatch(text) or float(text) == 0:
            self.fail(key, f"{key}: expected {expected}, got {text!r}")
        return float(text)

    def size(self, key: str) -> int | None:
        """Read a size in bytes; None for `auto` or an absent key."""
        expected = "auto or a size with its unit, as 640GiB or 24GB"
        text = self.text(key, expected)
        if text is None or text == "auto":
            return None
        count = try_parse_bytes(text)
        if not count:
            self.fail(key, f"{key}: expected {expected}, got {text!r}")
        return count

    def layers(self, key: str) -> tuple[range, ...] | None:
        """Read `3`, `1..60` or a list of these, each layer once, in ascending order; None when absent."""
        node = self.get(key)
        if node is None:
            return None
        if (word := _later_layers(node)) is not None:
            self.unavailable(key, f"{key}: {word}", "name the layers: a layer, a range as 1..60, or a list of these")
        items = node.items if isinstance(node, Sequence) else (node,)
        parts = sorted((self._layer_range(key, item) for item in items), key=lambda part: part.start)
        if not parts:
            self.fail(key, f"{key}: expected at least one layer, got an empty list")
        for before, after in pairwise(parts):
            if after.start < before.stop:
                self.fail(key, f"{key}: expected each layer once, got layer {after.start} again")
        return tuple(parts)

    def _layer_range(self, key: str, node: Node) -> range:
        expected = "a layer, a range as 1..60, or a list of these"
        match = _LAYERS.fullmatch(node.text) if isinstance(node, Scalar) else None
        if match is None:
            self.fail(key, f"{key}: expected {expected}, got {describe(node)}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            self.fail(key, f"{key}: expected a range that ascends, got {first}..{last}", f"write {last}..{first}")
        return range(first, last + 1)


def _later_layers(node: Node) -> str | None:
    """Find the word for a choice of layers that the form knows and this version does not have."""
    words = node.entries if isinstance(node, Mapping) else node.text.split() if isinstance(node, Scalar) else ()
    return next((word for word in words if word == HOTTEST), None)


def _did_you_mean(word: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else None


def describe(node: Node) -> str:
    """Say in an error what stands where something else is expected."""
    if isinstance(node, Sequence):
        return "a list" if node.items else "an empty list"
    if isinstance(node, Mapping):
        return "a mapping"
    return repr(node.text) if node.text else "nothing"

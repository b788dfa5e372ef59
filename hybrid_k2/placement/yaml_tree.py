"""A YAML file as a tree in which every value knows its line.

The tree is built from PyYAML's parser events, one step before YAML types come in: scalars stay text, so that `off`
is the word off and not a boolean, and nothing in the file can name a Python object. Anchors, aliases and tags are
refused; depth and file size are bounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from hybrid_k2.errors import RulesError

MAX_FILE_BYTES = 64 * 1024  # the longest sensible rule file is a few kilobytes
MAX_DEPTH = 8  # the form itself needs four


@dataclass(frozen=True)
class Scalar:
    """One value, as written; `text` is empty for a key without a value."""

    line: int
    text: str


@dataclass(frozen=True)
class Sequence:
    """A list of nodes."""

    line: int
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Mapping:
    """Keys with their nodes, and the line of each key."""

    line: int
    entries: dict[str, Node]
    key_lines: dict[str, int]


Node = Scalar | Sequence | Mapping


def fail(source: str, line: int | None, message: str, hint: str | None = None) -> NoReturn:
    """Raise a RulesError that begins with the place."""
    place = source if line is None else f"{source}:{line}"
    raise RulesError(f"{place}: {message}", hint=hint)


def parse_yaml(text: str, source: str) -> Node:
    """Build the tree of one YAML document; `source` names it in errors.

    Raises: RulesError: not YAML, empty, or it uses anchors, aliases, tags, a second document or a key twice.
    """
    try:
        return _Builder(text, source).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        fail(source, mark.line + 1 if mark else None, f"expected YAML, got: {error.problem or error.context}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        fail(source, line, f"expected printable text, got the character {chr(error.character)!r}")
    except (ValueError, OverflowError) as error:  # PyYAML lets chr() and int() of an escape or a directive through
        fail(source, None, f"expected YAML, got: {error}")


def read_text(path: Path, source: str, kind: str = "rule file") -> str:
    """Read a small UTF-8 file; messages call it a `kind`.

    Raises: RulesError: missing, no regular file, too large, not UTF-8.
    """
    # os.path answers False where pathlib raises (a name too long, a null character).
    if os.path.isdir(path):
        fail(source, None, f"expected a {kind}, got a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        fail(source, None, f"expected a {kind}, got a device, pipe or socket")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        fail(source, None, f"expected a {kind}, got no such file")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        fail(source, None, f"expected a readable {kind}, got: {reason}")
    if len(data) > MAX_FILE_BYTES:
        fail(source, None, f"expected a {kind} of at most {MAX_FILE_BYTES} bytes, got a larger one")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fail(source, line, f"expected UTF-8 text, got byte 0x{data[error.start]:02x}")


class _Builder:
    """Turns parser events into nodes by recursive descent."""

    def __init__(self, text: str, source: str) -> None:
        self.events: Iterator[yaml.Event] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.source = source

    def document(self) -> Node:
        next(self.events)  # stream start
        if not isinstance(next(self.events), yaml.DocumentStartEvent):
            fail(self.source, None, "expected keys and their values, got an empty file")
        root = self._node(next(self.events), depth=1)
        next(self.events)  # document end
        end = next(self.events)
        if isinstance(end, yaml.DocumentStartEvent):
            fail(self.source, _line(end), "expected one YAML document, got a second one")
        return root

    def _node(self, event: yaml.Event, depth: int) -> Node:
        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            fail(self.source, line, f"expected a value, got the alias *{event.anchor} (aliases are not accepted)")
        if not isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            fail(self.source, line, f"expected a value, got {event}")
        if event.anchor is not None:
            fail(self.source, line, f"expected a value, got the anchor &{event.anchor} (anchors are not accepted)")
        if event.tag is not None:
            fail(self.source, line, f"expected a plain value, got the tag {event.tag} (tags are not accepted)")
        if depth > MAX_DEPTH:
            fail(self.source, line, f"expected at most {MAX_DEPTH} levels of nesting, got more")
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(line, event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            return Sequence(line, tuple(self._items(depth)))
        return self._mapping(line, depth)

    def _items(self, depth: int) -> Iterator[Node]:
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            yield self._node(event, depth + 1)

    def _mapping(self, line: int, depth: int) -> Mapping:
        entries: dict[str, Node] = {}
        key_lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            if not isinstance(key, Scalar):
                fail(self.source, key.line, "expected a word as the key, got a list or mapping")
            if key.text in entries:
                first = key_lines[key.text]
                fail(self.source, key.line, f"expected each key once, got {key.text!r} again (first on line {first})")
            entries[key.text] = self._node(next(self.events), depth + 1)
            key_lines[key.text] = key.line
        return Mapping(line, entries, key_lines)


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1

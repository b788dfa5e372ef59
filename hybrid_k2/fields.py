"""Typed access to the fields of one JSON object; every error says where the field stands."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from hybrid_k2.errors import ConfigError, UnsupportedModelError, shown

MAX_INTEGER = 2**31 - 1  # no size of a model comes near; larger ones would only overflow elsewhere


class Fields:
    """Typed access to one JSON object; every error says where the field stands."""

    def __init__(self, data: Mapping[str, Any], place: str) -> None:
        self.data = data
        self.place = place

    def get(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        if name not in self.data:
            raise ConfigError(f"{self.place}: {name}: expected {expected}, got no such field")
        value = self.data[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.place}: {name}: expected {expected}, got {shown(value)}")
        return value

    def text(self, name: str) -> str:
        return str(self.get(name, str, "a string"))

    def json_object(self, name: str) -> dict[str, Any]:
        return dict(self.get(name, dict, "an object"))

    def flag(self, name: str) -> bool:
        return bool(self.get(name, bool, "true or false"))

    def integer(self, name: str, minimum: int = 1) -> int:
        expected = f"an integer of at least {minimum}"
        value = int(self.get(name, int, expected))
        if value < minimum:
            raise ConfigError(f"{self.place}: {name}: expected {expected}, got {shown(value)}")
        if value > MAX_INTEGER:
            raise ConfigError(f"{self.place}: {name}: expected at most {MAX_INTEGER}, got {shown(value)}")
        return value

    def number(self, name: str, above: float = 0.0) -> float:
        expected = f"a finite number above {above:g}"
        value = self.get(name, (int, float), expected)
        try:
            number = float(value)
        except OverflowError:  # an int that no float can hold
            number = math.inf
        if not math.isfinite(number) or number <= above:
            raise ConfigError(f"{self.place}: {name}: expected {expected}, got {shown(value)}")
        return number

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.data.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
            raise ConfigError(f"{self.place}: {name}: expected a token id, a list of them or null, got {shown(value)}")
        return tuple(ids)

    def token_id(self, name: str, default: int | None) -> int | None:
        ids = self.token_ids(name)
        if len(ids) > 1:
            raise ConfigError(f"{self.place}: {name}: expected one token id, got {shown(list(ids))}")
        return ids[0] if ids else default

    def check_ids(self, name: str, vocab_size: int) -> None:
        """Refuse token ids that the vocabulary does not have."""
        for token in self.token_ids(name):
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"{self.place}: {name}: expected token ids from 0 to {vocab_size - 1} (vocab_size), "
                    f"got {shown(token)}"
                )

    def must_be(self, name: str, expected: object, reason: str) -> None:
        """Refuse a present field with another value; `true` and `1` are not the same here."""
        value = self.data.get(name, expected)
        if type(value) is not type(expected) or value != expected:
            raise UnsupportedModelError(
                f"{self.place}: {name}: expected {_json(expected)}, got {_json(value)} (not implemented: {reason})"
            )

    def must_be_one_of(self, name: str, expected: tuple[str, ...], reason: str) -> None:
        value = self.text(name)
        if value not in expected:
            raise UnsupportedModelError(
                f"{self.place}: {name}: expected {' or '.join(expected)}, got {_json(value)} "
                f"(not implemented: {reason})"
            )


def _json(value: object) -> str:
    """Show a value as JSON writes it, where it can."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return shown(value)
    return text if len(text) <= 100 else shown(value)

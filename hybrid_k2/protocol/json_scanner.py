"""Follow a JSON value as it streams: enough of the grammar to know what lies inside a string."""

from __future__ import annotations

import re
from enum import Enum, auto

_STRING_BODY = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
_BLANK = re.compile(r"\s*")
_SCALAR = re.compile(r"[-+.0-9A-Za-z_]+")


class JsonState(Enum):
    """What the text so far amounts to; COMPLETE and BROKEN are final."""

    OPEN = auto()  # inside the value, outside any string
    STRING = auto()
    COMPLETE = auto()
    BROKEN = auto()  # no JSON object or array begins like this


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()


class JsonScanner:
    """Scan an object or array piece by piece, in time linear in its length.

    Numbers and literals are taken on trust and control characters are allowed in strings: the question is
    where strings begin and end, not whether a strict reader would agree.
    """

    def __init__(self) -> None:
        self.state = JsonState.OPEN
        self._expect = _Expect.VALUE
        self._open: list[str] = []  # the closing bracket of each open container
        self._in_scalar = False
        self._escaped = False  # the last character was a backslash inside a string

    def scan(self, text: str) -> None:
        """Take the next piece of text."""
        position = 0
        while position < len(text):
            if self.state is JsonState.STRING:
                position = self._scan_string(text, position)
            elif self.state is JsonState.OPEN:
                position = self._scan_outside(text, position)
            else:
                return

    def _scan_string(self, text: str, position: int) -> int:
        if self._escaped:
            self._escaped = False
            return position + 1
        end = _match_end(_STRING_BODY, text, position)
        if end == len(text):
            return end
        if text[end] == "\\":
            self._escaped = True
        else:
            self.state = JsonState.OPEN
            self._expect = _Expect.COLON if self._expect is _Expect.KEY else _Expect.COMMA_OR_END
        return end + 1

    def _scan_outside(self, text: str, position: int) -> int:
        end = _match_end(_BLANK, text, position)
        if end > position:
            self._in_scalar = False
            return end
        scalar = _SCALAR.match(text, position)
        if scalar:
            self._take_scalar()
            return scalar.end()
        self._in_scalar = False
        self._take_sign(text[position])
        return position + 1

    def _take_scalar(self) -> None:
        if self._in_scalar:
            return
        if self._open and self._expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            self._in_scalar = True
            self._expect = _Expect.COMMA_OR_END
        else:
            self.state = JsonState.BROKEN

    def _take_sign(self, sign: str) -> None:
        expect = self._expect
        if sign in "{[" and expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            self._open.append("}" if sign == "{" else "]")
            self._expect = _Expect.KEY_OR_END if sign == "{" else _Expect.VALUE_OR_END
        elif sign == '"' and self._open and expect not in (_Expect.COLON, _Expect.COMMA_OR_END):
            self.state = JsonState.STRING
            self._expect = _Expect.KEY if expect in (_Expect.KEY, _Expect.KEY_OR_END) else _Expect.VALUE
        elif sign == ":" and expect is _Expect.COLON:
            self._expect = _Expect.VALUE
        elif sign == "," and expect is _Expect.COMMA_OR_END:
            self._expect = _Expect.KEY if self._open[-1] == "}" else _Expect.VALUE
        elif self._open and sign == self._open[-1] and expect in self._may_end():
            self._open.pop()
            self._expect = _Expect.COMMA_OR_END
            if not self._open:
                self.state = JsonState.COMPLETE
        else:
            self.state = JsonState.BROKEN

    def _may_end(self) -> tuple[_Expect, _Expect]:
        return (_Expect.COMMA_OR_END, _Expect.KEY_OR_END if self._open[-1] == "}" else _Expect.VALUE_OR_END)


def _match_end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position

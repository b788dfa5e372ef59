"""Follow a reply through its grammar: which tokens may come next."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np

from hybrid_k2.engine.grammar import Grammar, limits, llguidance, no_panic, reason
from hybrid_k2.errors import RequestError
from hybrid_k2.protocol import Tokenizer
from hybrid_k2.protocol.tokens import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    CALL_END,
    REPLY_ENDS,
    SECTION_BEGIN,
    SECTION_END,
    THINK_END,
)

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from numpy.typing import NDArray


class GuideVocabulary:
    """A checkpoint's tokens as llguidance needs them; building it takes a second or two, so an engine has one."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        """`end_ids`: what may end a reply, beside the ends of a turn. Raises: RequestError without llguidance."""
        self.size = tokenizer.vocab_size
        self.special = tokenizer.special
        self.end_ids = frozenset(end_ids) | {self.special[name] for name in REPLY_ENDS if name in self.special}
        self.tokens = _tokens(tokenizer, sorted(self.end_ids))


class _State(Enum):
    THINKING = auto()
    FREE = auto()  # text, in which a section of calls may begin
    TEXT = auto()  # text, and no more calls
    DUE = auto()  # a section of calls must begin
    BOUND = auto()  # inside the grammar
    DONE = auto()  # nothing but the end may come


class Guide:
    """Say which tokens of one reply may come next. One thread at a time may use it.

    Thinking is free but for markers that have no place in it: those that would leave a call outside a section, and,
    where the grammar asks for something after the thinking, the end of the reply.
    """

    def __init__(self, grammar: Grammar, vocabulary: GuideVocabulary, thinking: bool) -> None:
        """`thinking`: the reply begins inside reasoning. Raises: RequestError for a grammar that no text fits."""
        self._grammar = grammar
        self._vocabulary = vocabulary
        what = "schema" if grammar.binds == "content" else "tools"
        with no_panic(what):
            self._matcher = llguidance().LLMatcher(vocabulary.tokens, grammar.source, log_level=0, limits=limits())
            # A grammar that has no first token is wrong; so are those too large for a mask.
            self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError(f"{what}: expected a grammar that some text fits, got: {self._problem()}")
        self._masks: dict[_State, NDArray[np.bool_]] = {}
        self._state = _State.THINKING if thinking else self._after_thinking()

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that the grammar takes for the end of the reply."""
        return self._vocabulary.end_ids

    def allowed(self) -> NDArray[np.bool_]:
        """Give the tokens that may come next, for reading only. Shapes: -> [V].

        Raises: RequestError when the grammar takes more than it may.
        """
        if self._state is not _State.BOUND:
            if self._state not in self._masks:
                self._masks[self._state] = self._mask_of(self._state)
            return self._masks[self._state]
        with no_panic("grammar"):
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocabulary.size, bitorder="little").view(np.bool_)

    def advance(self, token: int) -> None:
        """Take the token that was chosen, an allowed one. Raises: RequestError as `allowed` does."""
        special = self._vocabulary.special
        if self._state is _State.BOUND:
            self._consume(token)
            if self._grammar.binds == "calls" and self._matcher.is_stopped():
                self._state = self._after_calls()
        elif token == special[SECTION_BEGIN]:
            self._matcher.reset()
            if self._grammar.binds == "content":  # the calls are a part of its grammar
                self._consume(token)
            self._state = _State.BOUND
        elif self._state is _State.THINKING and token == special[THINK_END]:
            self._state = self._after_thinking()

    def _consume(self, token: int) -> None:
        with no_panic("grammar"):
            self._matcher.consume_token(token)
        self._check()

    def _after_thinking(self) -> _State:
        if self._grammar.binds == "content":
            return _State.BOUND
        return _State.DUE if self._grammar.required else _State.FREE

    def _after_calls(self) -> _State:
        if self._grammar.required:
            return _State.DONE
        return _State.FREE if self._grammar.repeats else _State.TEXT

    def _mask_of(self, state: _State) -> NDArray[np.bool_]:
        special, ends = self._vocabulary.special, list(self._vocabulary.end_ids)
        if state in (_State.DUE, _State.DONE):
            mask = np.zeros(self._vocabulary.size, np.bool_)
            mask[[special[SECTION_BEGIN]] if state is _State.DUE else ends] = True
            return mask
        mask = np.ones(self._vocabulary.size, np.bool_)
        mask[[special[name] for name in (SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END)]] = False
        if state is _State.TEXT or not self._grammar.calls:
            mask[special[SECTION_BEGIN]] = False
        if state is _State.THINKING and (self._grammar.binds == "content" or self._grammar.required):
            mask[ends] = False
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"grammar: expected it within its bounds, got: {self._problem()}",
                hint="give the schema fewer alternatives, and patterns with fewer repetitions",
            )

    def _problem(self) -> str:
        return reason(self._matcher.get_error())


def _tokens(tokenizer: Tokenizer, end_ids: list[int]) -> LLTokenizer:
    llguidance()  # or the error that says how to install it
    from llguidance.tiktoken import lltokenizer_from_encoding

    return lltokenizer_from_encoding(tokenizer.encoding, n_vocab=tokenizer.vocab_size, eos_token=end_ids)

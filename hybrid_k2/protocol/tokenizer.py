"""Text to token ids and back: the K2.6 byte-pair vocabulary, run by tiktoken."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import tiktoken

from hybrid_k2.errors import CheckpointError, RequestError
from hybrid_k2.protocol.tokens import REQUIRED
from hybrid_k2.protocol.vocabulary import read_ranks, read_special

# What may become one token: the first alternative that matches, at each position.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Longer text is encoded in pieces, cut where the model's own tokenizer cuts: the ids stay the same,
# and neither the split pattern nor the merging meets a run that it takes quadratic time for.
WINDOW_CHARS = 400_000
RUN_CHARS = 25_000
_RUN = re.compile(r"\s+|\S+")


class Tokenizer:
    """Turn text into the ids of one checkpoint's vocabulary and ids into text.

    A lone surrogate, which no UTF-8 text can hold, is encoded as U+FFFD; a surrogate pair as its character.
    """

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int]) -> None:
        self.special: Mapping[str, int] = MappingProxyType(special)
        self.special_ids = frozenset(special.values())
        self.vocab_size = len(ranks) + len(special)
        self._encoding = tiktoken.Encoding(
            "kimi-k2", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Load `tiktoken.model` and `tokenizer_config.json` from a checkpoint folder.

        Raises: CheckpointError, naming file and line, when one is missing or damaged.
        """
        ranks = read_ranks(Path(folder) / "tiktoken.model")
        config = Path(folder) / "tokenizer_config.json"
        special = read_special(config, base=len(ranks))
        for name in REQUIRED:
            if name not in special:
                raise CheckpointError(f"{config}: added_tokens_decoder: expected an id for {name}, got none")
        return cls(ranks, special)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} ids, {len(self.special)} special)"

    @property
    def encoding(self) -> tiktoken.Encoding:
        """The same vocabulary for libraries that take one of tiktoken."""
        return self._encoding

    def token_id(self, name: str) -> int:
        """Return the id of a special token.

        Raises: CheckpointError when the vocabulary has no such token.
        """
        if name not in self.special:
            raise CheckpointError(f"special token {name}: expected it in the vocabulary, got none of that name")
        return self.special[name]

    def encode(self, text: str, allow_special: bool = False, most: int | None = None) -> list[int]:
        """Encode text; look-alikes of special tokens are ordinary text unless `allow_special` is true.

        Encoding stops when there are more than `most` ids: a text that is too long takes no more time for it.
        """
        return self._encode_parts([(text, False)], self.special.keys() if allow_special else (), most)

    def encode_parts(self, parts: Sequence[tuple[str, bool]], most: int | None = None) -> list[int]:
        """Encode (text, is a special token) parts, with long text cut as if all were one string; `most` as above.

        Raises: CheckpointError when a special token is not in the vocabulary.
        """
        return self._encode_parts(parts, (), most)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the ids; a special token gives its name.

        Raises: RequestError for an id outside the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, with U+FFFD for bytes that are no UTF-8.

        Raises: RequestError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decoder(self) -> IncrementalDecoder:
        """Return a decoder for ids that arrive piece by piece."""
        return IncrementalDecoder(self)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id.

        Raises: RequestError for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(f"token id: expected 0..{self.vocab_size - 1}, got {token_id}")
        return self._encoding.decode_single_token_bytes(token_id)

    def _encode_parts(self, parts: Sequence[tuple[str, bool]], allowed: Collection[str], most: int | None) -> list[int]:
        """Encode parts; in their ordinary text the special tokens that are allowed are such tokens."""
        clean = [(_replace_surrogates(text), control) for text, control in parts]
        special = frozenset(allowed)
        ids: list[int] = []
        for piece, control in _pieces(clean):
            if control:
                ids.append(self.token_id(piece))
            elif special:
                ids += self._encoding.encode(piece, allowed_special=special, disallowed_special=())
            else:
                ids += self._encoding.encode_ordinary(piece)
            if most is not None and len(ids) > most:
                break
        return ids


class IncrementalDecoder:
    """Decode ids as they arrive; never hands out a part of a UTF-8 character.

    All `feed` results and `finish`, joined, equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that the ids complete."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """Return U+FFFD for a character left incomplete, and start afresh."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _replace_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _cuts(text: str) -> Iterator[int]:
    """Yield where long text is cut: each window's end, and each RUN_CHARS inside a run of (non-)white space."""
    if len(text) <= RUN_CHARS:
        return
    for start in range(0, len(text), WINDOW_CHARS):
        end = min(start + WINDOW_CHARS, len(text))
        for run in _RUN.finditer(text, start, end):
            yield from range(run.start() + RUN_CHARS, run.end(), RUN_CHARS)
        yield end


def _pieces(parts: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Yield the parts, their ordinary text in pieces; the cuts are those of all text as one."""
    whole = "".join(text for text, _ in parts)
    cuts = _cuts(whole)
    cut = next(cuts, len(whole))
    start = 0
    for text, control in parts:
        end = start + len(text)
        while not control and cut < end:
            if cut > start:
                yield whole[start:cut], False
                start = cut
            cut = next(cuts, len(whole))
        if start < end:
            yield whole[start:end], control
        start = end

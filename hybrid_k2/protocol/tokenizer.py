"""Text to token ids and back: the K2.6 byte-pair vocabulary, run by tiktoken."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
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

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Encode text; look-alikes of special tokens are ordinary text unless `allow_special` is true."""
        text = _replace_surrogates(text)
        allowed = self.special.keys() if allow_special else frozenset()
        return self._encode_pieces(_split(text, _cuts(text)), frozenset(allowed))

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Encode (text, is a special token) parts, with long text cut as if all were one string.

        Raises: CheckpointError when a special token is not in the vocabulary.
        """
        clean = [(_replace_surrogates(text), control) for text, control in parts]
        cuts = _cuts("".join(text for text, _ in clean))
        ids: list[int] = []
        start = 0
        for text, control in clean:
            if control:
                ids.append(self.token_id(text))
            else:
                inside = [cut - start for cut in cuts if start < cut < start + len(text)]
                ids += self._encode_pieces(_split(text, inside), frozenset())
            start += len(text)
        return ids

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

    def _encode_pieces(self, pieces: Iterable[str], allowed: frozenset[str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if allowed:
                ids += self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
            else:
                ids += self._encoding.encode_ordinary(piece)
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


def _cuts(text: str) -> list[int]:
    """Return where long text is cut: each window's end, and each RUN_CHARS inside a run of (non-)white space."""
    if len(text) <= RUN_CHARS:
        return []
    cuts: list[int] = []
    for start in range(0, len(text), WINDOW_CHARS):
        end = min(start + WINDOW_CHARS, len(text))
        for run in _RUN.finditer(text, start, end):
            cuts += range(run.start() + RUN_CHARS, run.end(), RUN_CHARS)
        cuts.append(end)
    return cuts


def _split(text: str, cuts: Sequence[int]) -> list[str]:
    edges = [0, *cuts, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges) if start < end]

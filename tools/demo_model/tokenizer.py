"""Train the byte-level BPE vocabulary, and encode rendered conversations."""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from .template import Part

BASE, RESERVED = 1792, 256
EDGED_SHARE = 5  # one token in so many is a word with the space or sign before it
_HAN, _TAIL = r"[\p{Han}]+", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_EDGE = r"[^\r\n\p{L}\p{N}]?"
PATTERN = "|".join(
    [_HAN, f"{_EDGE}{_UPPER}*{_LOWER}+{_TAIL}", f"{_EDGE}{_UPPER}+{_LOWER}*{_TAIL}", r"\p{N}{1,3}",
     r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]
)  # fmt: skip
# Offsets of the control tokens behind the vocabulary, as in K2.6.
SPECIALS = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>", 17: "<|im_middle|>", 18: "<|media_begin|>", 19: "<|media_content|>", 20: "<|media_end|>",
    21: "<|media_pad|>", 22: "<think>", 23: "</think>", 254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
KEPT = (11, 12, 13, 14, 15, 22, 23)  # offsets whose text survives skip_special_tokens


def train_vocabulary(pieces: Counter[bytes], size: int = BASE) -> list[bytes]:
    """Choose the tokens: parts of words first, then frequent words with the space or sign before them.

    A rare word has the same tokens behind a space, a quotation mark or nothing: what is copied from a question into an
    answer or an argument is copied token by token. Digits stay single tokens.
    """
    cores: Counter[bytes] = Counter()
    for piece, count in pieces.items():
        cores[split_edge(piece)[1]] += count
    words = list(cores)
    split = [[bytes([b]) for b in word] for word in words]
    vocabulary = [bytes([b]) for b in range(256)]
    vocabulary += merges(split, list(cores.values()), size - len(vocabulary) - size // EDGED_SHARE)
    # Such a token must not be a part of another word, or that word would change with what stands before it.
    first_parts = {parts[0] for parts in split if len(parts) > 1}
    whole = {word for word, parts in zip(words, split, strict=True) if len(parts) == 1} - first_parts
    edged = [(-n, piece) for piece, n in pieces.items() if split_edge(piece)[0] and split_edge(piece)[1] in whole]
    return vocabulary + [piece for _, piece in sorted(edged)[: size - len(vocabulary)]]


def split_edge(piece: bytes) -> tuple[bytes, bytes]:
    """Take off the space or sign that the pattern leaves before a word."""
    is_edge = len(piece) > 1 and piece[0] < 128 and not piece[:1].isalnum() and (piece[1:2].isalpha() or piece[1] > 127)
    return (piece[:1], piece[1:]) if is_edge else (b"", piece)


def merges(words: list[list[bytes]], counts: list[int], number: int) -> list[bytes]:
    """Merge the most frequent neighbours in all words, in place, and return the new tokens in order."""
    tokens: list[bytes] = []
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    places: defaultdict[tuple[bytes, bytes], set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += counts[i]
            places[pair].add(i)
    while len(tokens) < number:
        best = max((p for p in pairs if not has_digit(p)), key=lambda p: (pairs[p], p))
        tokens.append(best[0] + best[1])
        for i in places.pop(best):
            for pair in pairwise(words[i]):
                pairs[pair] -= counts[i]
            words[i][:] = merge(words[i], best)
            for pair in pairwise(words[i]):
                pairs[pair] += counts[i]
                places[pair].add(i)
        del pairs[best]
    return tokens


def has_digit(pair: tuple[bytes, bytes]) -> bool:
    """Tell whether a merge would contain a digit."""
    return any(48 <= b <= 57 for b in pair[0] + pair[1])


def merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Join each occurrence of the pair."""
    out: list[bytes] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def save_vocabulary(vocabulary: list[bytes], path: Path) -> None:
    """Write tiktoken's form: base64 of the bytes, a space, the rank."""
    lines = (base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(vocabulary))
    path.write_bytes(b"\n".join(lines) + b"\n")


def split_words(text: str) -> list[bytes]:
    """Split text as the vocabulary's pattern does, without merging anything."""
    pattern = PATTERN.replace("&&[^\\p{Han}]]", "--\\p{Han}]")
    return [m.encode() for m in regex.findall(pattern, text, regex.V1)]


class Tokenizer:
    """Encode and decode with the trained vocabulary."""

    def __init__(self, path: Path) -> None:
        ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in path.read_bytes().splitlines())}
        names = {i: SPECIALS.get(i, f"<|reserved_token_{BASE + i}|>") for i in range(RESERVED)}
        self.special = {name: BASE + i for i, name in names.items()}
        self._encoding = tiktoken.Encoding(
            "k2-tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )

    def encode(self, parts: list[Part]) -> tuple[list[int], list[bool]]:
        """Turn a rendered conversation into ids and marks of the trained ones."""
        ids: list[int] = []
        trained: list[bool] = []
        for part in parts:
            new = [self.special[part.text]] if part.control else self._encoding.encode_ordinary(part.text)
            ids += new
            trained += [part.trained] * len(new)
        return ids, trained

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text."""
        return self._encoding.decode(ids)

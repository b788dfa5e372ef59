"""The tokenizer: golden ids, special tokens only on request, long text, streaming, damaged files."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_k2.errors import CheckpointError, RequestError
from hybrid_k2.protocol import Tokenizer
from hybrid_k2.protocol.tokenizer import RUN_CHARS, WINDOW_CHARS
from tests.conftest import SHARED
from tests.protocol_strategies import (
    ANY_TEXT,
    MERGES,
    SPECIAL_OFFSETS,
    real_tokenizer,
    small_tokenizer,
    tokenizers,
    write_vocabulary,
)

QUICK = settings(suppress_health_check=list(HealthCheck))
TOKENIZER = st.sampled_from(tokenizers())
BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture
def real() -> Tokenizer:
    tokenizer = real_tokenizer()
    if tokenizer is None:
        pytest.skip("the K2.6 vocabulary is not at hand")
    return tokenizer


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (
            "LMDeploy correctness check: The capital of France is",
            [32956, 41058, 103615, 2598, 25, 646, 10484, 318, 15383, 387],
        ),
        (
            "<|im_user|>user<|im_middle|>请只回答一个词：中国的首都是哪里？<|im_end|><|im_assistant|>assistant<|im_middle|><think>",
            [
                *(163587, 2482, 163601, 2066, 989, 9481, 162912, 2648, 8448),
                *(1997, 1924, 8344, 864, 163586, 163588, 69702, 163601, 163606),
            ],
        ),
    ],
)
def test_golden_ids(real: Tokenizer, text: str, ids: list[int]) -> None:
    assert real.encode(text, allow_special=True) == ids
    assert real.decode(ids) == text


def test_real_vocabulary(real: Tokenizer) -> None:
    assert real.vocab_size == 163_840
    assert real.special["[BOS]"] == 163_584
    assert real.special["<|reserved_token_163589|>"] == 163_589
    assert real.special["[PAD]"] == 163_839
    assert [real.encode(chr(code)) for code in range(33, 127)] == [[code - 33] for code in range(33, 127)]


def test_demo_sized_vocabulary() -> None:
    folder = SHARED / "prototypes" / "demo-model" / "checkpoint"
    if not folder.is_dir():
        pytest.skip("the prototype checkpoint is not at hand")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == 2048
    assert tokenizer.token_id("<think>") == 1792 + 22
    text = "The demo model, 12 + 30 = 42. 你好 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("HelloWorld it's", ["Hello", "World", " it's"]),
        ("中文abc", ["中文", "abc"]),
        ("1234567", ["123", "456", "7"]),
        ("a  b", ["a", " ", " b"]),
        ("x\n\n  y", ["x", "\n\n", " ", " y"]),
        (" !?\n\nz", [" !?\n\n", "z"]),
        ("don'T", ["don'T"]),
    ],
)
def test_split_pattern_keeps_pieces_apart(tmp_path: Path, text: str, pieces: list[str]) -> None:
    """Every substring of the text is a token here, so each piece of the split comes out as one token."""
    data = text.encode()
    grams = {data[i:j] for i in range(len(data)) for j in range(i + 2, len(data) + 1)}
    tokens = BYTES + sorted(grams, key=lambda gram: (len(gram), gram))
    tokenizer = Tokenizer.load(write_vocabulary(tmp_path, tokens, SPECIAL_OFFSETS))
    assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == pieces


@QUICK
@given(TOKENIZER, ANY_TEXT)
def test_text_survives_and_look_alikes_are_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids.intersection(ids)


@QUICK
@given(TOKENIZER, st.lists(st.sampled_from(sorted(SPECIAL_OFFSETS)) | st.sampled_from(["a", " b", "你"]), max_size=8))
def test_special_tokens_are_recognised_on_request(tokenizer: Tokenizer, pieces: list[str]) -> None:
    ids = tokenizer.encode("".join(pieces), allow_special=True)
    expected = [tokenizer.special[piece] for piece in pieces if piece in tokenizer.special]
    assert [token for token in ids if token in tokenizer.special_ids] == expected
    assert tokenizer.decode(ids) == "".join(pieces)


@QUICK
@given(TOKENIZER, st.text())
def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer, text: str) -> None:
    wild = f"{text}\ud800{text}\udc00"
    assert tokenizer.decode(tokenizer.encode(wild)) == wild.encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace"
    )


def test_a_surrogate_pair_is_one_character() -> None:
    assert small_tokenizer().encode("\ud83d\ude42") == small_tokenizer().encode("🙂")


@QUICK
@given(TOKENIZER, st.data())
def test_incremental_decoding_equals_decoding_at_once(tokenizer: Tokenizer, data: st.DataObject) -> None:
    odd_bytes = st.binary(max_size=6).map(
        lambda value: [token for byte in value for token in (small_byte(tokenizer, byte),)]
    )
    pieces = data.draw(
        st.lists(
            ANY_TEXT.map(tokenizer.encode)
            | odd_bytes
            | st.sampled_from(sorted(tokenizer.special_ids)).map(lambda i: [i]),
            max_size=6,
        )
    )
    ids = [token for piece in pieces for token in piece]
    decoder = tokenizer.decoder()
    texts = [decoder.feed(chunk) for chunk in chunks(ids, data)]
    assert "".join(texts) + decoder.finish() == tokenizer.decode(ids)
    assert decoder.finish() == ""


def small_byte(tokenizer: Tokenizer, byte: int) -> int:
    """Return the id of a single byte."""
    if tokenizer is small_tokenizer():
        return byte
    return next(token for token in range(256) if tokenizer.token_bytes(token) == bytes([byte]))


def chunks(ids: list[int], data: st.DataObject) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    return [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def test_a_character_is_never_handed_out_in_part() -> None:
    tokenizer = small_tokenizer()
    decoder = tokenizer.decoder()
    for character in "é你🙂":
        *first, last = character.encode()
        assert [decoder.feed([byte]) for byte in first] == [""] * len(first)
        assert decoder.feed([last]) == character
    assert decoder.feed(list("你".encode()[:2])) == ""
    assert decoder.finish() == "\ufffd"


def reference_cuts(text: str) -> list[str]:
    """Cut windows, then runs, one character at a time."""
    pieces = []
    for start in range(0, len(text), WINDOW_CHARS):
        piece, run, was_space = "", 0, None
        for character in text[start : start + WINDOW_CHARS]:
            run = run + 1 if character.isspace() == was_space else 1
            was_space = character.isspace()
            if run > RUN_CHARS:
                pieces.append(piece)
                piece, run = "", 1
            piece += character
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize("seed", range(4))
def test_long_text_is_cut_as_the_reference_says(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(
        rng.choice("ab1.\u3000 \n\x1c你") * rng.choice([1, 3, 24_999, 25_000, 25_001, 60_000]) for _ in range(30)
    )
    for tokenizer in tokenizers():
        assert tokenizer.encode(text) == [token for piece in reference_cuts(text) for token in tokenizer.encode(piece)]


def test_text_beyond_the_most_ids_is_not_encoded() -> None:
    rng = random.Random(7)
    text = "".join(rng.choice(["ab ", "1", "\n", "你"]) for _ in range(WINDOW_CHARS))
    head, rest = text[:WINDOW_CHARS], text[WINDOW_CHARS:]
    assert rest
    for tokenizer in tokenizers():
        first = tokenizer.encode(head)
        whole = first + tokenizer.encode(rest)
        assert tokenizer.encode(text, most=1) == first
        assert tokenizer.encode(text, most=len(first)) == whole
        assert tokenizer.encode("ab 1", most=0) == tokenizer.encode("ab 1"), "a piece is never cut"
        name = next(iter(tokenizer.special))
        parts = [(name, True), (text, False), (name, True)]
        assert tokenizer.encode_parts(parts, most=0) == [tokenizer.special[name]]
        assert tokenizer.encode_parts(parts, most=10**9) == tokenizer.encode_parts(parts)


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6, "\n" * 10**6, "!" * 10**6, "ab " * 10**5, "你" * 10**5])
def test_long_runs_are_encoded(text: str) -> None:
    for tokenizer in tokenizers():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("token", [-1, 10**6])
def test_ids_outside_the_vocabulary(token: int) -> None:
    tokenizer = small_tokenizer()
    for call in (tokenizer.decode, tokenizer.decode_bytes, tokenizer.decoder().feed):
        with pytest.raises(RequestError, match=f"token id: expected 0..{tokenizer.vocab_size - 1}, got {token}"):
            call([0, token])


def test_unknown_special_token() -> None:
    with pytest.raises(CheckpointError, match="special token <x>: expected it in the vocabulary"):
        small_tokenizer().token_id("<x>")


# -- damaged files


def load_with(folder: Path, *, model: bytes | None = None, config: bytes | None = None) -> Tokenizer:
    write_vocabulary(folder, BYTES + MERGES, SPECIAL_OFFSETS)
    if model is not None:
        (folder / "tiktoken.model").write_bytes(model)
    if config is not None:
        (folder / "tokenizer_config.json").write_bytes(config)
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"", r"tiktoken\.model: expected a rank for each of the 256 bytes, got none for 0x00"),
        (b"YQ== 0\nYg==\n", r"tiktoken\.model:2: expected 'base64 rank', got b'Yg=='"),
        (b"YQ== 0\nYg== one\n", r"tiktoken\.model:2: expected 'base64 rank'"),
        (b"YQ== 0\nY!g= 1\n", r"tiktoken\.model:2: token: expected base64, got b'Y!g='"),
        (b"YQ== 0\nYg== 0\n", r"tiktoken\.model:2: rank 0: expected once, got it on line 1 too"),
        (b"YQ== 0\n\nYQ== 1\n", r"tiktoken\.model:3: token b'a': expected once, got it again \(rank 0\)"),
        (b"YQ== 0\nYg== 2\n", r"tiktoken\.model:2: ranks: expected 0\.\.1 without a gap, got 2 and no 1"),
        (b"YQ== 0\nYg== 1\n", r"expected a rank for each of the 256 bytes, got none for 0x00"),
        (b"YQ== " + b"9" * 6000 + b"\n", r"tiktoken\.model:1: expected 'base64 rank'"),
        (b"\x00\xff\x80\n", r"tiktoken\.model:1: expected 'base64 rank'"),
    ],
)
def test_damaged_ranks(tmp_path: Path, model: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_with(tmp_path, model=model)


BASE = 256 + len(MERGES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"", r"tokenizer_config\.json: expected valid JSON"),
        (b'{\n"a": x\n}', r"tokenizer_config\.json: expected valid JSON, got: .* line 2 "),
        (b'{"a": "\xff"}', r"tokenizer_config\.json: expected valid JSON, got: 'utf-8' codec"),
        (
            b'{"a": ' + b"9" * 6000 + b"}",
            r"tokenizer_config\.json: expected valid JSON, got: an integer of 6000 digits",
        ),
        (b"[" * 200_000, r"tokenizer_config\.json: expected valid JSON"),
        (b'{"a": 1, "a": 1}', r"tokenizer_config\.json: expected valid JSON, got: key 'a' twice"),
        (b"[]", r"tokenizer_config\.json: expected a JSON object, got list"),
        (b"{}", r"added_tokens_decoder: expected an object of ids"),
        (b'{"added_tokens_decoder": {"7": {"content": "<x>"}}}', rf"\['7'\]: expected an id in {BASE}\.\.{BASE + 255}"),
        (b'{"added_tokens_decoder": {"' + b"9" * 6000 + b'": {}}}', r"\['9+\.\.\.\]: expected an id"),
        (f'{{"added_tokens_decoder": {{"0{BASE}": {{"content": "<x>"}}}}}}'.encode(), r"\]: expected an id"),
        (b'{"added_tokens_decoder": {"x": {"content": "<x>"}}}', r"\['x'\]: expected an id"),
        (f'{{"added_tokens_decoder": {{"{BASE}": {{}}}}}}'.encode(), r"\.content: expected the token's text, got None"),
        (f'{{"added_tokens_decoder": {{"{BASE}": "x"}}}}'.encode(), r"\.content: expected the token's text"),
        (b'{"added_tokens_decoder": {}}', r"expected an id for <\|im_system\|>, got none"),
    ],
)
def test_damaged_config(tmp_path: Path, config: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_with(tmp_path, config=config)


def test_one_name_for_two_ids(tmp_path: Path) -> None:
    added = {str(BASE + offset): {"content": name} for name, offset in SPECIAL_OFFSETS.items()}
    added[str(BASE + 100)] = {"content": "<think>"}
    with pytest.raises(
        CheckpointError, match=f"special token <think>: expected one id, got {BASE + 22} and {BASE + 100}"
    ):
        load_with(tmp_path, config=json.dumps({"added_tokens_decoder": added}).encode())


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    write_vocabulary(tmp_path, BYTES, SPECIAL_OFFSETS)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / name}: expected a file, got no such file")):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_that_git_did_not_fetch(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, BYTES, SPECIAL_OFFSETS)
    (tmp_path / "tiktoken.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9000\n")
    with pytest.raises(CheckpointError, match="expected the file itself, got a Git LFS pointer") as error:
        Tokenizer.load(tmp_path)
    assert "git lfs pull" in str(error.value.hint)

"""What is encoded when, and what is kept; the encoder is a stand-in that counts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hybrid_k2.engine import sight as sight_module
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.sequence import TokenSequence, image_places
from hybrid_k2.engine.sight import Sight
from hybrid_k2.errors import EngineError
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.protocol.images import image_token

HIDDEN = 3


@dataclass
class Picture:
    """An image for the stand-in: its features tell digest and row."""

    digest: int
    tokens: int

    @property
    def features(self) -> Tensor:
        rows = torch.arange(self.tokens, dtype=torch.float32)
        return torch.stack([torch.full_like(rows, self.digest), rows, -rows], 1)


@dataclass
class Eye:
    """Encode in so many pieces, and count what was begun."""

    pieces: int = 3
    fails: bool = False
    begun: list[int] = field(default_factory=list)

    def begin(self, image: Picture) -> Encoding:
        self.begun.append(image.digest)
        return Encoding(self, image)


@dataclass
class Encoding:
    eye: Eye
    image: Picture
    done: int = 0

    @property
    def features(self) -> Tensor:
        assert self.done == self.eye.pieces
        return self.image.features

    def step(self) -> bool:
        if self.eye.fails:
            raise EngineError("blind")
        self.done += 1
        return self.done == self.eye.pieces


def make_sequence(*parts: int | Picture) -> TokenSequence:
    """Make a sequence: so many tokens of text, or an image."""
    ids: list[int] = []
    pictures = {}
    for part in parts:
        if isinstance(part, Picture):
            pictures[part.digest] = part
            ids += [image_token(part.digest, row) for row in range(part.tokens)]
        else:
            ids += [7] * part
    nothing = cast(Any, None)
    return TokenSequence(ids, SamplingParams(), 1, nothing, nothing, (), (), (), 1, images=cast(Any, pictures))


def make_sight(eye: Eye) -> Sight:
    return Sight(cast(Any, eye))


def chunks(sequence: TokenSequence, limit: int) -> Sequence[Chunk]:
    return sequence.next_chunks(limit)


def test_places_of_images() -> None:
    one, other = 5, 2**128 - 1
    ids = [1, *(image_token(one, row) for row in range(3)), 2, *(image_token(one, row) for row in range(3))]
    ids += [image_token(other, 0), 4]
    assert image_places(ids) == [(one, 1, 4), (one, 5, 8), (other, 8, 9)]
    assert image_places([1, 2]) == []


def test_a_batch_takes_rows_of_images_in_place_of_the_embedding() -> None:
    chance = random.Random()
    for _ in range(50):
        pictures = [Picture(digest, chance.randint(1, 9)) for digest in (3, 4)]
        made, expected = list[Chunk](), list[int]()
        for number in range(chance.randint(1, 4)):
            sequence = make_sequence(chance.randint(1, 3), *chance.choices(pictures, k=2), chance.randint(1, 3))
            first = chance.randrange(len(sequence.tokens))
            made.append(
                Chunk(sequence.tokens[first : chance.randint(first + 1, len(sequence.tokens))], first, [number])
            )
            expected += made[-1].token_ids
        batch = Batch.build(made, features={picture.digest: picture.features for picture in pictures})
        assert rows_of(batch) == expected
        assert [row for half in batch.halves() for row in rows_of(half)] == expected


def rows_of(batch: Batch) -> list[int]:
    """Return the token of each row; for one of an image, as its features tell it."""
    tokens = batch.token_ids.tolist()
    if batch.seen is not None:
        for row, (digest, place, negative) in zip(batch.seen.rows.tolist(), batch.seen.features.tolist(), strict=True):
            assert (tokens[row], negative) == (0, -place)
            tokens[row] = image_token(int(digest), int(place))
    return tokens


def test_an_image_is_encoded_once_and_in_pieces() -> None:
    eye, picture = Eye(pieces=3), Picture(1, 4)
    sight, sequence = make_sight(eye), make_sequence(2, picture, 2, picture, 1)
    assert sight.sees(sequence, 2)
    assert not sight.sees(sequence, 3)
    for piece in range(3):
        assert sight.look(sequence, (), 3, seconds=0)
        assert sight.sees(sequence, 3) == (piece == 2)
    assert eye.begun == [1]
    other = make_sequence(picture, 9)
    assert sight.sees(other, 100)
    assert sight.features([(other, chunks(other, 2))])[1].equal(picture.features)


def test_what_was_not_looked_at_is_encoded_when_it_is_needed() -> None:
    eye, first, second = Eye(), Picture(1, 4), Picture(2, 2)
    sight, sequence = make_sight(eye), make_sequence(1, first, 1, second, 1)
    assert sight.features([(sequence, chunks(sequence, 3))]).keys() == {1}
    assert eye.begun == [1]
    sequence.cached = 5  # behind the first image
    assert sight.features([(sequence, chunks(sequence, 9))]).keys() == {2}
    sequence.cached = len(sequence.tokens) - 1
    assert sight.features([(sequence, chunks(sequence, 9))]) == {}


def test_an_error_ends_an_encoding_and_the_next_begins_anew() -> None:
    eye, sequence = Eye(), make_sequence(Picture(1, 2), 1)
    sight = make_sight(eye)
    assert sight.look(sequence, (), 9, seconds=0)
    eye.fails = True
    with pytest.raises(EngineError, match="blind"):
        sight.look(sequence, (), 9, seconds=0)
    eye.fails = False
    assert sight.look(sequence, (), 9, seconds=100)
    assert sight.sees(sequence, 9)
    assert eye.begun == [1, 1]


def test_another_image_may_come_between() -> None:
    eye = Eye()
    sight, one, other = make_sight(eye), make_sequence(Picture(1, 2), 1), make_sequence(Picture(2, 2), 1)
    sight.look(one, (), 9, seconds=0)
    sight.look(other, [one], 9, seconds=100)
    assert sight.sees(other, 9)
    sight.look(one, [other], 9, seconds=100)
    assert sight.sees(one, 9)
    assert eye.begun == [1, 2, 1]


def test_what_was_used_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight_module, "FEATURE_ROWS", 10)
    eye = Eye()
    sight = make_sight(eye)
    sequences = {digest: make_sequence(Picture(digest, 4), 1) for digest in (1, 2, 3)}
    for digest in (1, 2, 1, 3):  # 2 goes
        sight.features([(sequences[digest], chunks(sequences[digest], 9))])
    assert [sight.sees(sequences[digest], 9) for digest in (1, 2, 3)] == [True, False, True]
    assert eye.begun == [1, 2, 3]


def test_one_waits_until_others_have_been_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight_module, "FEATURE_ROWS", 10)
    sight = make_sight(Eye())
    ready, late, large = (make_sequence(Picture(digest, size), 1) for digest, size in ((1, 4), (2, 8), (3, 50)))
    assert sight.look(ready, [late, large], 99, seconds=100)
    assert not sight.look(late, [ready, large], 99, seconds=100)
    assert sight.sees(ready, 99)
    ready.cached = 4
    assert sight.look(late, [ready, large], 99, seconds=100)
    assert not sight.look(large, [late], 99, seconds=100)
    late.cached = 8
    assert sight.look(large, [late], 99, seconds=100)  # alone it may be larger than all that is kept
    assert sight.sees(large, 99)
    assert not sight.sees(make_sequence(Picture(2, 8), 1), 99)


def test_two_that_lack_something_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight_module, "FEATURE_ROWS", 10)
    sight = make_sight(Eye(pieces=1))
    one, other = (make_sequence(Picture(a, 6), Picture(a + 1, 6), 1) for a in (1, 11))
    assert sight.look(one, [other], 99, seconds=0)
    assert sight.look(other, [one], 99, seconds=0)
    assert sight.look(one, [other], 99, seconds=0)
    assert sight.look(one, [other], 99, seconds=0)
    assert sight.sees(one, 99)


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_ends_within_the_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the service does it: who sees is computed, and in turn who does not gets a piece of what it lacks."""
    monkeypatch.setattr(sight_module, "FEATURE_ROWS", 10)
    chance = random.Random(seed)
    pictures = [Picture(digest, chance.randint(1, 12)) for digest in range(6)]
    waiting = []
    for _ in range(chance.randint(1, 5)):
        waiting.append(make_sequence(*chance.choices([*pictures, 1, 3], k=chance.randint(1, 6)), 1))
    limit = chance.randint(1, 15)
    sight, most = make_sight(Eye(pieces=chance.randint(1, 3))), 10
    for _ in range(1000):
        work = [(one, chunks(one, limit)) for one in waiting if sight.sees(one, limit)]
        sight.features(work)
        for one, computed in work:
            one.chunks_done(computed)
            waiting.remove(one)
        waiting += [one for one, _ in work if one.remaining]
        lacking = next((one for one in waiting if not sight.sees(one, limit)), None)
        needs = [sum(one.images[digest].tokens for digest in {*one.images_within(limit)}) for one in waiting]
        most = max([most, *needs])
        if lacking is not None:
            sight.look(lacking, [one for one in waiting if one is not lacking], limit, seconds=0)
        assert sum(map(len, sight._features.values())) <= most
        if not waiting:
            return
    raise AssertionError("some prompt never ended")


def test_forgets() -> None:
    sight, sequence = make_sight(Eye()), make_sequence(Picture(1, 2), 1)
    sight.look(sequence, (), 9, seconds=100)
    sight.forget()
    assert not sight.sees(sequence, 9)

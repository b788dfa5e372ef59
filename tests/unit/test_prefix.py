"""The prefix cache against a plain model of it: whatever happens, nobody reads a latent that is not his prefix's."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from hybrid_k2.config import ModelConfig
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.engine.prefix import Node, PrefixCache
from hybrid_k2.engine.prefix_file import check_prefix_file, restore_prefixes, save_prefixes
from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.errors import ConfigError, EngineError
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.placement.plan import KvCachePlan
from tests.conftest import REPO
from tests.generators import config_dict

CONFIG = ModelConfig.from_dict(config_dict(num_hidden_layers=2), "test")
PAGE = 4


def make_cache(pages: int) -> LatentCache:
    return LatentCache(KvCachePlan("host", "fp32", pages * PAGE, PAGE, 0), CONFIG)


def make_sequence(tokens: list[int], *, seed: int | None = None, block: int = 8, salt: str = "") -> TokenSequence:
    nothing = cast(Any, None)
    params = SamplingParams(seed=seed)
    sequence = TokenSequence([*tokens], params, 1, nothing, nothing, (), (), (), block)
    sequence.salt = salt
    return sequence


class World:
    """A cache, its sequences, and what each of their latents must be.

    A latent is a number: its whole part says of which tokens it is, its fraction how it was computed: 0 in whole blocks
    of a prompt, by chance otherwise.
    """

    def __init__(self, chance: random.Random, pages: int, ram_pages: int) -> None:
        self.chance = chance
        self.cache = make_cache(pages)
        self.prefix = PrefixCache(self.cache, ram_pages * self.cache.page_like().nbytes)
        self.running: dict[TokenSequence, list[float]] = {}
        self.kept: list[tuple[str, list[int]]] = []
        self.hit_tokens = {False: 0, True: 0}  # of sequences that repeat, and of others

    def start(self, sequence: TokenSequence) -> None:
        self.prefix.lend(sequence)
        assert sequence.cached < len(sequence.tokens)
        latents = [self.read(sequence, place) for place in range(sequence.cached)]
        assert [int(latent) for latent in latents] == [self.name(sequence, place) for place in range(sequence.cached)]
        whole = sequence.repeatable if not sequence.repeats else sequence.cached
        assert all(latent == int(latent) for latent in latents[:whole])
        assert sequence.repeatable % sequence.block_tokens == 0
        self.running[sequence] = latents
        self.hit_tokens[sequence.repeats] += sequence.cached

    def compute(self, sequence: TokenSequence, limit: int) -> bool:
        """Run a step; False if there are no pages."""
        chunks = sequence.next_chunks(limit)
        stop = chunks[-1].cached + len(chunks[-1].token_ids)
        missing = max(0, self.cache.pages_for(stop) - len(sequence.pages))
        if not self.prefix.has_room(missing):
            with pytest.raises(EngineError, match="free pages"):
                self.prefix.allocate(missing)
            return False
        sequence.pages.extend(self.prefix.allocate(missing))
        for chunk in chunks:
            whole = sequence.repeatable == chunk.cached and sequence.block_tokens in (1, len(chunk.token_ids))
            for place in range(chunk.cached, chunk.cached + len(chunk.token_ids)):
                fraction = 0.0 if whole else self.chance.randrange(1, 64) / 64
                self.write(sequence, place, self.name(sequence, place) + fraction)
            sequence.chunks_done([chunk])
        if sequence.remaining == 0:
            sequence.tokens.append(self.chance.randrange(3))
        return True

    @property
    def room(self) -> int:
        pages = self.cache.pool.pages
        return max(count for count in range(pages + 1) if self.prefix.has_room(count))

    def keep(self, sequence: TokenSequence) -> None:
        self.kept.append((sequence.salt, sequence.tokens[: sequence.cached]))
        self.prefix.keep(sequence)
        del self.running[sequence]

    def check(self) -> None:
        for sequence, latents in self.running.items():
            assert [self.read(sequence, place) for place in range(sequence.cached)] == latents
        pool = self.cache.pool
        pages = {page for sequence in self.running for page in sequence.pages}
        tree = [node for _, node in self.prefix.nodes()]
        pages |= {node.page for node in tree if node.page is not None}
        assert pool.available == pool.pages - len(pages)
        assert self.prefix.stored_pages <= self.prefix.ram_pages
        assert all((node.page is None) != (node.stored is None) for node in tree)
        assert pool.available <= self.room <= pool.pages

    @staticmethod
    def name(sequence: TokenSequence, place: int) -> int:
        return hash((sequence.salt, *sequence.tokens[: place + 1])) % (1 << 16)

    def _at(self, sequence: TokenSequence, place: int) -> tuple[int, int]:
        return sequence.pages[place // PAGE], place % PAGE

    def read(self, sequence: TokenSequence, place: int) -> float:
        layers = torch.stack([layer[self._at(sequence, place)] for layer in self.cache.layers])
        assert (layers == layers[0, 0]).all()
        return float(layers[0, 0])

    def write(self, sequence: TokenSequence, place: int, value: float) -> None:
        for layer in self.cache.layers:
            layer[self._at(sequence, place)] = value
        self.running[sequence].append(value)


def random_tokens(chance: random.Random) -> list[int]:
    """Return tokens that often begin like others."""
    length = chance.randrange(1, 30)
    return [0] * chance.randrange(length) + [chance.randrange(2) for _ in range(length)]


@pytest.mark.parametrize("ram_pages", [0, 3, 40])
@pytest.mark.parametrize("block", [1, 3, 4, 8])
def test_whatever_happens_latents_are_those_of_the_prefix(block: int, ram_pages: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    world = World(chance, 24, ram_pages)
    waiting: list[TokenSequence] = []
    for _ in range(600):
        running = [*world.running]
        action = chance.random()
        if action < 0.2 and len(running) < 4:
            seed_or_none = chance.choice([None, 7])
            new = make_sequence(random_tokens(chance), seed=seed_or_none, block=block, salt=chance.choice("ab"))
            world.start(waiting.pop() if waiting and chance.random() < 0.5 else new)
        elif action < 0.75 and running:
            sequence = chance.choice(running)
            if not world.compute(sequence, chance.randrange(1, 20)):
                world.keep(chance.choice(running))
            elif sequence.cached >= sequence.prompt_tokens and chance.random() < 0.3:
                world.prefix.publish(sequence)
        elif action < 0.9 and running:
            sequence = chance.choice(running)
            world.keep(sequence)
            if chance.random() < 0.5:  # it goes on later
                waiting.append(sequence)
        elif action < 0.95 and running:
            sequence = chance.choice(running)
            world.prefix.take_back(sequence)
            del world.running[sequence]
        elif action > 0.995:
            world.prefix.release()
        elif action > 0.98:
            count = chance.randrange(world.room + 1)
            world.cache.pool.free(world.prefix.allocate(count))
        world.check()
    for sequence in [*world.running]:
        world.prefix.take_back(sequence)
    world.prefix.release()
    assert world.cache.pool.available == 24
    assert all(world.hit_tokens.values())


def test_the_longest_common_prefix_of_all_is_found() -> None:
    chance = random.Random()
    world = World(chance, 2000, 0)
    for _ in range(150):
        sequence = make_sequence(random_tokens(chance), salt=chance.choice("ab"))
        expected = max(
            (common(tokens, sequence.tokens[:-1]) for salt, tokens in world.kept if salt == sequence.salt), default=0
        )
        world.start(sequence)
        assert sequence.cached == expected
        for _ in range(chance.randrange(1, 8)):
            world.compute(sequence, 16)
        world.keep(sequence)


def common(left: list[int], right: list[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
    )


def run(world: World, tokens: list[int], **options: Any) -> TokenSequence:
    sequence = make_sequence(tokens, **options)
    world.start(sequence)
    world.compute(sequence, 1000)
    return sequence


def hit(world: World, tokens: list[int], **options: Any) -> int:
    sequence = make_sequence(tokens, **options)
    world.start(sequence)
    cached = sequence.cached
    world.prefix.take_back(sequence)
    del world.running[sequence]
    return cached


def test_what_was_used_least_recently_goes_first() -> None:
    world = World(random.Random(), 6, 0)
    for first in (1, 2, 3, 1, 4):
        world.keep(run(world, [first] * 2 * PAGE))
    assert [hit(world, [first] * 2 * PAGE + [9]) for first in (1, 2, 3, 4)] == [2 * PAGE, 0, 2 * PAGE, 2 * PAGE]


def test_what_leaves_the_pages_comes_back_from_memory() -> None:
    world = World(random.Random(), 6, 4)
    for first in (1, 2, 3, 4, 5):
        world.keep(run(world, [first] * 2 * PAGE))
    assert (world.prefix.kept_pages, world.prefix.stored_pages) == (6, 4)
    assert [hit(world, [first] * 2 * PAGE + [9]) for first in (5, 4, 3, 2, 1)] == [2 * PAGE] * 5
    world.keep(run(world, [6] * 2 * PAGE))  # the oldest, 5, is too much now
    assert [hit(world, [first] * 2 * PAGE + [9]) for first in (1, 2, 3, 4, 5)] == [2 * PAGE] * 4 + [0]


def test_a_request_that_repeats_reuses_whole_blocks_of_prompts_alone() -> None:
    world = World(random.Random(), 100, 0)
    sequence = run(world, [1] * 21, seed=1)
    for _ in range(6):
        world.compute(sequence, 1)
    world.keep(sequence)
    longer = [*sequence.tokens, 9]
    assert hit(world, longer) == 27
    assert hit(world, longer, seed=1) == 16
    assert hit(world, longer, seed=1, salt="other") == 0
    world.keep(run(world, [1] * 27, seed=1))  # now the third block is known, where the reply was
    assert hit(world, [1] * 30, seed=1) == 24


def test_a_sequence_that_goes_on_gets_its_own_reply_again_in_its_own_bits() -> None:
    """Its reply was computed token by token; a later prompt with the same tokens was computed in blocks."""
    world = World(random.Random(), 100, 0)
    sequence = run(world, [1] * 12, seed=1)
    for _ in range(6):
        sequence.tokens[-1] = 1
        world.compute(sequence, 1)
    world.keep(sequence)
    world.keep(run(world, [1] * 40, seed=1))
    world.start(sequence)
    assert sequence.cached == 8
    assert [len(chunk.token_ids) for chunk in sequence.next_chunks(1000)] == [4, *[1] * 7]


def test_without_a_seed_a_prompt_is_one_chunk_whose_bits_nobody_repeats() -> None:
    world = World(random.Random(), 100, 0)
    sequence = make_sequence([1] * 40)
    (chunk,) = sequence.next_chunks(33)
    assert len(chunk.token_ids) == 33
    world.keep(run(world, [1] * 40))
    assert hit(world, [1] * 40) == 39
    assert hit(world, [1] * 40, seed=1) == 0


# On disk


def saved(tmp_path: Path) -> tuple[World, Path]:
    world = World(random.Random(), 20, 20)
    for tokens in ([1] * 18, [1] * 9 + [2] * 9, [3] * 5):
        world.keep(run(world, tokens, seed=1, salt="x"))
    path = tmp_path / "deep" / "cache"
    save_prefixes(world.prefix, path, "this engine")
    return world, path


def restored(path: Path, ram_pages: int = 20, fingerprint: str = "this engine") -> World:
    world = World(random.Random(), 20, ram_pages)
    restore_prefixes(world.prefix, path, fingerprint)
    world.check()
    return world


def test_a_saved_cache_is_read_again(tmp_path: Path) -> None:
    before, path = saved(tmp_path)
    world = restored(path)
    assert world.prefix.stored_pages == before.prefix.kept_pages
    assert [path.name for path in path.parent.iterdir()] == ["cache"]
    assert path.stat().st_mode & 0o777 == 0o600
    for tokens in ([1] * 19, [1] * 9 + [2] * 10, [3] * 6, [1] * 11):
        assert hit(world, tokens, salt="x") == hit(before, tokens, salt="x") > 0
        assert hit(world, tokens, seed=1, salt="x") == hit(before, tokens, seed=1, salt="x")
    assert hit(world, [1] * 19, seed=1, salt="x") == 16
    assert hit(world, [1] * 19) == 0  # without the salt
    again = tmp_path / "again"
    save_prefixes(world.prefix, again, "this engine")
    assert hit(restored(again), [1] * 19, salt="x") == 18


def test_only_what_fits_is_read_the_latest_first(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    world = restored(path, ram_pages=3)
    assert world.prefix.stored_pages == 3
    assert [hit(world, tokens, salt="x") for tokens in ([3] * 6, [1] * 19)] == [5, PAGE]


def test_without_a_file_there_is_nothing_to_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert restored(tmp_path / "none").prefix.stored_pages == 0
    assert not caplog.records


@pytest.mark.parametrize("damage", ["cut", "flipped", "longer", "foreign", "empty", "text", "folder"])
def test_a_file_that_is_not_right_is_not_used(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, path = saved(tmp_path)
    data, chance = path.read_bytes(), random.Random()
    place = chance.randrange(len(data))
    print("place", place, "of", len(data))
    if damage == "cut":
        path.write_bytes(data[:place])
    elif damage == "flipped":
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
    elif damage == "longer":
        path.write_bytes(data + data[-100:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("notes\n" * 1000)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    world = restored(path, fingerprint="another engine" if damage == "foreign" else "this engine")
    assert world.prefix.stored_pages == 0
    assert hit(world, [1] * 19, salt="x") == 0
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{path}: the saved prefix cache is not used: " in record.getMessage()


def test_a_cache_that_cannot_be_saved_leaves_the_old_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world, path = saved(tmp_path)
    before = path.read_bytes()
    path.with_name("cache.partial").mkdir()
    save_prefixes(world.prefix, path, "this engine")
    assert path.read_bytes() == before
    assert "the prefix cache could not be saved" in caplog.text


def test_what_saving_would_write_over_is_looked_at_first(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache"
    check_prefix_file(path)
    assert [*path.parent.iterdir()] == []
    partial = path.with_name("cache.partial")
    partial.write_bytes(b"hybrid-k2 pre")  # of a process that was killed
    check_prefix_file(path)
    partial.write_text("notes")
    with pytest.raises(ConfigError, match=r"cache\.partial: expected a prefix cache, an empty file or none"):
        check_prefix_file(path)
    assert partial.read_text() == "notes"
    with pytest.raises(ConfigError, match="expected a folder that can be made for it, got embedded null"):
        check_prefix_file(tmp_path / "null\0byte" / "cache")


def test_a_cache_that_cannot_be_read_is_not_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the GPU has been lost: the service still has to end."""
    world, path = saved(tmp_path)
    before = path.read_bytes()

    def lost(node: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: the launch timed out")

    monkeypatch.setattr(world.prefix, "content", lost)
    save_prefixes(world.prefix, path, "this engine")
    assert path.read_bytes() == before
    assert "the prefix cache could not be saved: CUDA error" in caplog.text
    assert not path.with_name("cache.partial").exists()


KILLED = """
import sys
from pathlib import Path
from hybrid_k2.engine.prefix_file import save_prefixes
from tests.unit.test_prefix import World, random, run
world = World(random.Random(), 300, 300)
world.keep(run(world, [1] * 1000))
while True:
    save_prefixes(world.prefix, Path(sys.argv[1]), "this engine")
"""


def test_a_process_that_is_killed_leaves_a_file_that_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=REPO)
    while not path.exists():
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(random.random() / 10)
    child.kill()
    child.wait()
    assert restored(path, ram_pages=300).prefix.stored_pages == 250
    assert not caplog.records


def test_a_conversation_may_be_longer_than_recursion_is_deep(tmp_path: Path) -> None:
    pages = 3 * sys.getrecursionlimit()
    world = World(random.Random(), pages, pages)
    world.keep(make_kept(world, pages))
    assert [node.parent for _, node in world.prefix.nodes()][1:] == [node for _, node in world.prefix.nodes()][:-1]
    save_prefixes(world.prefix, tmp_path / "cache", "this engine")
    world.prefix.release()
    assert world.cache.pool.available == pages
    restore_prefixes(world.prefix, tmp_path / "cache", "this engine")
    assert world.prefix.stored_pages == pages
    world.prefix.release()


def make_kept(world: World, pages: int) -> TokenSequence:
    """Return a sequence that fills so many pages, without computing them one by one."""
    sequence = make_sequence([1] * pages * PAGE)
    sequence.pages = world.prefix.allocate(pages)
    sequence.cached = pages * PAGE
    world.running[sequence] = []
    return sequence


def test_the_closest_of_many_children_is_found() -> None:
    chance = random.Random()
    for _ in range(30):
        node = Node((), None)
        children = {tuple(chance.choices(range(3), k=chance.randrange(1, 9))) for _ in range(60)}
        for tokens in children:
            node.add(Node(tokens, node))
        for gone in chance.sample(sorted(children), len(children) // 3):
            node.remove(node.children[gone])
            children.remove(gone)
        for _ in range(40):
            part = tuple(chance.choices(range(3), k=chance.randrange(1, 9)))
            found, length = node.closest(part)
            assert length == max(common([*tokens], [*part]) for tokens in children)
            assert (found is not None) == (length > 0)
            assert found is None or common([*found.tokens], [*part]) == length
            assert {child.tokens for child in node.longer(part)} == {t for t in children if t[: len(part)] == part}
            assert {child.tokens for child in node.shorter(part)} == {
                tokens for tokens in children if len(tokens) < len(part) and part[: len(tokens)] == tokens
            }


def test_sequences_that_computed_the_same_share_its_pages() -> None:
    """Or their copies of the first pages could not leave while they use the last: with many, nobody could go on."""
    world = World(random.Random(), 20, 0)
    first, second = (run(world, [1] * 3 * PAGE, block=1) for _ in range(2))
    assert world.cache.pool.available == 14
    for sequence in (first, second):
        world.prefix.publish(sequence)
    assert first.pages == second.pages
    assert world.cache.pool.available == 17
    world.check()


def test_salts_whose_pages_are_gone_are_forgotten() -> None:
    """Clients choose salts freely: one that was only looked up, or lost its last page, takes no memory."""
    prefix = PrefixCache(make_cache(4))
    tokens = list(range(3 * PAGE))
    for number in range(50):
        sequence = make_sequence(tokens, salt=f"salt {number}")
        prefix.lend(make_sequence(tokens, salt=f"asked {number}"))
        prefix.lend(sequence)
        sequence.pages = prefix.allocate(3)
        sequence.cached = len(tokens)
        prefix.keep(sequence)
    assert prefix.kept_pages <= 4
    assert len(prefix._roots) <= 3

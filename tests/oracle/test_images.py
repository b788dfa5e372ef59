"""Prompts with images against transformers' own model of the same weights: the logits after every token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_k2.engine import Engine, SamplingParams
from hybrid_k2.engine.sequence import TokenSequence, image_places
from hybrid_k2.model.batch import Batch
from hybrid_k2.protocol import Clip, Video, is_image_token
from hybrid_k2.protocol.tokens import MEDIA_PAD
from tests.generators import load_transformers_twin, write_checkpoint, write_transformers_twin
from tests.pictures import ask, noise_png, random_image

pytest.importorskip("PIL", reason="needs Pillow: pip install pillow")
pytest.importorskip("transformers", reason="transformers is the oracle: pip install 'hybrid-k2[test]'")

TOLERANCE = 2e-3  # of logits, as for text (test_transformers.py)
ALL_EXPERTS = {"n_routed_experts": 5, "num_experts_per_tok": 5}  # so that no choice of them is a tie


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_logits_of_prompts_with_images(tmp_path: Path, chunk_tokens: int | None) -> None:
    folder = write_checkpoint(tmp_path / "ours", seed=1, num_hidden_layers=3, **ALL_EXPERTS)
    theirs, report = load_transformers_twin(write_transformers_twin(folder, tmp_path / "theirs"))
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    chance = random.Random(5)
    one, two, three = (noise_png(*(28 * chance.randint(1, 7) for _ in range(2)), seed) for seed in range(3))
    with Engine.load(folder, "reference") as engine:
        for parts in ([one, "What is it?"], ["a ", one, "b", two, three, "c", one], [two]):
            (sequence,) = engine.sequences(
                None, messages=ask(*parts), tools=None, thinking=False, preserve_thinking=False, params=SamplingParams()
            )
            got = our_logits(engine, sequence, chunk_tokens)
            images = [sequence.images[digest] for digest, _, _ in image_places(sequence.tokens)]
            assert len(images) == sum(isinstance(part, bytes) for part in parts)
            pad = engine.tokenizer.special[MEDIA_PAD]
            ids = [pad if is_image_token(token) else token for token in sequence.tokens]
            assert ids.count(pad) == sum(image.tokens for image in images)
            with torch.inference_mode():
                expected = theirs(
                    torch.tensor([ids]),
                    pixel_values=torch.cat([image.patches() for image in images]),
                    image_grid_thw=torch.tensor([[1, *image.grid] for image in images]),
                    use_cache=False,
                ).logits[0]
            assert (got - expected).abs().max() < TOLERANCE
            assert torch.equal(got.argmax(1), expected.argmax(1))


def test_logits_of_prompts_with_clips(tmp_path: Path) -> None:
    """Their model has no clips in prompts; their tower has, one at a time, and their text model takes its rows."""
    folder = write_checkpoint(tmp_path / "ours", seed=2, num_hidden_layers=3, **ALL_EXPERTS)
    theirs, report = load_transformers_twin(write_transformers_twin(folder, tmp_path / "theirs"))
    assert not report["missing_keys"]
    clips = [random_image(2 * rows, 4, seed=rows, frames=frames) for rows, frames in ((1, 4), (3, 4), (2, 1), (1, 3))]
    video = Video(tuple(Clip(2.0 * number, clip) for number, clip in enumerate(clips)))
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "What?"}]}]
    with Engine.load(folder, "reference") as engine:
        (sequence,) = engine.sequences(
            None, messages=messages, tools=None, thinking=False, preserve_thinking=False, params=SamplingParams()
        )
        got = our_logits(engine, sequence, 7)
        assert [digest for digest, _, _ in image_places(sequence.tokens)] == [clip.digest for clip in clips]
        with torch.inference_mode():
            rows = []
            for clip in clips:
                grid = torch.tensor([[clip.frames, *clip.grid]])
                tower = theirs.model.vision_tower(clip.patches(), grid_thw=grid)
                rows.append(theirs.model.mm_projector(tower.pooler_output)[:, 0])
            seen = torch.tensor([is_image_token(token) for token in sequence.tokens])
            ids = torch.tensor([0 if is_image_token(token) else token for token in sequence.tokens])
            embedded = theirs.get_input_embeddings()(ids)
            embedded[seen] = torch.cat(rows)
            expected = theirs(inputs_embeds=embedded[None], use_cache=False).logits[0]
        assert (got - expected).abs().max() < TOLERANCE
        assert torch.equal(got.argmax(1), expected.argmax(1))


def our_logits(engine: Engine, sequence: TokenSequence, chunk_tokens: int | None) -> Tensor:
    """Compute a prompt as the engine does, in chunks of so many tokens, with the logits of all of them."""
    runner, parts = engine.runner, []
    sequence.pages = runner.cache.pool.allocate(runner.cache.pages_for(len(sequence.tokens)))
    while sequence.remaining:
        chunks = sequence.next_chunks(chunk_tokens or len(sequence.tokens))
        batch = Batch.build(chunks, all_logits=True, features=runner.sight.features([(sequence, chunks)]))
        parts.append(engine.loaded.text.forward(batch, runner.cache))
        sequence.chunks_done(chunks)
    runner.cache.pool.free(sequence.pages)
    return torch.cat(parts)

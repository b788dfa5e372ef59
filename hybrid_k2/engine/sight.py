"""See the images of prompts: encode them, a piece at a time, and keep what they give until it has been computed.

A prompt names the rows of an image by its digest (protocol/images.py): two prompts with the same image share its
features, and one that finds its latents in the prefix cache needs none.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.model.batch import Chunk
from hybrid_k2.placement.overheads import FEATURE_ROWS
from hybrid_k2.protocol import Image

if TYPE_CHECKING:
    from hybrid_k2.model.vision import Encoding, VisionModel


class Sight:
    """Own the features of images, in host memory. One thread at a time.

    It keeps at most FEATURE_ROWS rows, those used last; more only where one sequence's next chunks need more, and then
    these alone.
    """

    def __init__(self, vision: VisionModel | None) -> None:
        self._vision = vision
        self._features: dict[int, Tensor] = {}  # by digest, from the least to the most recently used
        self._encoding: tuple[int, Encoding] | None = None  # the one on its way

    def sees(self, sequence: TokenSequence, limit: int) -> bool:
        """Say whether all images are there that the sequence's next chunks of this limit need."""
        return all(digest in self._features for digest in sequence.images_within(limit))

    def look(self, sequence: TokenSequence, beside: Iterable[TokenSequence], limit: int, seconds: float) -> bool:
        """Go on encoding the next image that a sequence lacks; False: others have to be computed first, to make room.

        It takes so many seconds, or one piece of the work if that takes longer. The images that sequences `beside` it
        need now, and lack none, are kept.
        Raises: EngineError, MemoryBudgetError.
        """
        needed = sequence.images_within(limit)
        others = {digest for other in beside if self.sees(other, limit) for digest in other.images_within(limit)}
        image = next(sequence.images[digest] for digest in needed if digest not in self._features)
        if others and not self._has_room(image, others.union(needed)):
            return False
        self._encode(image, others.union(needed), time.perf_counter() + seconds)
        return True

    def features(self, work: Iterable[tuple[TokenSequence, Sequence[Chunk]]]) -> dict[int, Tensor]:
        """Return the features that these chunks need, by digest; those that are not there are encoded now.

        Shapes: [tokens of the image, hidden] each.
        Raises: EngineError, MemoryBudgetError.
        """
        found: dict[int, Tensor] = {}
        for sequence, chunks in work:
            stop = chunks[-1].cached + len(chunks[-1].token_ids)
            for digest in sequence.images_within(stop - sequence.cached):
                if digest not in self._features:
                    self._encode(sequence.images[digest], found.keys())
                found[digest] = self._features[digest] = self._features.pop(digest)
        return found

    def forget(self) -> None:
        """Let go of everything."""
        self._features.clear()
        self._encoding = None

    def _encode(self, image: Image, needed: Collection[int], end: float | None = None) -> None:
        """Encode an image until its features are there, or it is time to stop; none of the needed ones goes for it."""
        assert self._vision is not None, "expected vision in a model whose prompts have images"
        digest, encoding = self._encoding or (None, None)
        if encoding is None or digest != image.digest:
            encoding = self._vision.begin(image)
        self._encoding = None  # an error ends it
        while not encoding.step():
            if end is not None and time.perf_counter() >= end:
                self._encoding = image.digest, encoding
                return
        for old in [digest for digest in self._features if digest not in needed]:
            if self._rows() + image.tokens <= FEATURE_ROWS:
                break
            del self._features[old]
        self._features[image.digest] = encoding.features.cpu()

    def _has_room(self, image: Image, needed: Collection[int]) -> bool:
        held = sum(len(rows) for digest, rows in self._features.items() if digest in needed)
        return held + image.tokens <= FEATURE_ROWS

    def _rows(self) -> int:
        return sum(len(rows) for rows in self._features.values())

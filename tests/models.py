"""Load text models for tests, and run token ids through them in chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hybrid_k2.checkpoint import Checkpoint, experts_packed
from hybrid_k2.config import ModelConfig
from hybrid_k2.host.threads import NodeThreads
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.loader import load_text_model
from hybrid_k2.model.text import TextModel
from hybrid_k2.model.vision import VisionModel
from hybrid_k2.model.vision_loading import load_vision_model
from hybrid_k2.placement import Machine, Plan, Rules, make_plan, shipped_rules


@dataclass(frozen=True)
class Loaded:
    """Hold a model and what it was loaded from."""

    model: TextModel
    config: ModelConfig
    plan: Plan

    def cache(self) -> LatentCache:
        """Make an empty cache."""
        return LatentCache(self.plan.kv_cache, self.config)

    def logits(self, token_ids: Sequence[int], chunks: Sequence[int] = (), cache: LatentCache | None = None) -> Tensor:
        """Return the logits after every token, computed in chunks of these sizes; the rest is one chunk.

        Shapes: -> [T, vocab].
        """
        cache = cache or self.cache()
        pages = cache.pool.allocate(cache.pages_for(len(token_ids)))
        parts, done = [], 0
        for size in [*chunks, len(token_ids)]:
            ids = token_ids[done : done + size]
            if ids:
                parts.append(self.model.forward(Batch.build([Chunk(ids, done, pages)], all_logits=True), cache))
                done += len(ids)
        cache.pool.free(pages)
        return torch.cat(parts)


def make_test_plan(checkpoint: Checkpoint, config: ModelConfig, rules: str | Rules, **changes: object) -> Plan:
    """Plan for this machine, with one thread (the models of tests are too small for more) and these other changes."""
    rules = shipped_rules(rules) if isinstance(rules, str) else rules
    plan = make_plan(rules, config, Machine.probe(), experts_packed=experts_packed(checkpoint, config))
    return dataclasses.replace(plan, **{"nodes": (NodeThreads(1),), **changes})  # type: ignore[arg-type]


@contextmanager
def loaded(folder: Path, rules: str | Rules = "reference", **changes: object) -> Iterator[Loaded]:
    """Load a checkpoint by rules, with changes to their plan, and close the model at the end."""
    config = ModelConfig.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        plan = make_test_plan(checkpoint, config, rules, **changes)
        model = load_text_model(checkpoint, config, plan)
    try:
        yield Loaded(model, config, plan)
    finally:
        model.close()


@contextmanager
def loaded_vision(folder: Path, rules: str | Rules = "reference", **changes: object) -> Iterator[VisionModel]:
    """Load the vision tower of a checkpoint by rules, with changes to their plan, and close it at the end."""
    config = ModelConfig.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        plan = make_test_plan(checkpoint, config, rules, **changes)
        model = load_vision_model(checkpoint, config, plan, lambda nbytes: None)
    assert model is not None
    try:
        yield model
    finally:
        model.close()


def part_by_part(model: TextModel) -> None:
    """Let a model compute the parts of its layers one by one, where it would compute few rows by whole layers."""
    model.layers = [dataclasses.replace(layer, whole=None) for layer in model.layers]

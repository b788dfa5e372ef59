"""Engines over random checkpoints, for tests: one thread, small caches and chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid_k2.engine import Engine, Reply, SamplingParams
from hybrid_k2.placement import Rules, parse_rules
from tests.generators import write_checkpoint

GREEDY = SamplingParams(temperature=0, ignore_eos=True)


def host_rules(*, dtype: str = "fp32", numerics: str = "reference", tokens: int = 640, chunk_tokens: int = 16) -> Rules:
    """Return rules that place everything on the host."""
    groups = ("embedding", "attention", "dense_mlp", "shared_experts", "lm_head")
    lines = [
        "version: 1",
        "devices: {host: {threads: 1}}",
        "place:",
        *(f"  - {{what: {what}, on: host, dtype: {dtype}}}" for what in groups),
        "  - {what: routed_experts, on: host}",
        f"kv_cache: {{on: host, dtype: {dtype}, tokens: {tokens}}}",
        f"numerics: {numerics}",
        f"prefill: {{chunk_tokens: {chunk_tokens}}}",
    ]
    return parse_rules("\n".join(lines) + "\n", "test.yaml")


def random_engine(folder: Path, *, rules: dict[str, Any] | None = None, **overrides: Any) -> Engine:
    """Write a random checkpoint and load it: small, with plain experts, so that a step takes about a millisecond."""
    small = {"num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "packed": False}
    return Engine.load(write_checkpoint(folder, **(small | overrides)), host_rules(**(rules or {})))


def native_engine(folder: Path, **rules: Any) -> Engine:
    """Load a model on native kernels, which give a token the same bits in any batch and in any chunk."""
    sizes = {"q_lora_rank": 64, "qk_rope_head_dim": 32}  # that the kernels have
    return random_engine(folder, rules={"dtype": "bf16", "numerics": "exact", **rules}, packed=True, **sizes)


def generated(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY, **changes: Any) -> Reply:
    """Run a prompt to its end and return the reply."""
    with engine.generate(prompt, params=replace(params, **changes)) as generation:
        for _ in generation:
            pass
    return generation.reply


def free_pages(engine: Engine) -> int:
    """Count free pages, the kept prefix given back."""
    engine._prefix.release()
    return engine._cache.pool.available

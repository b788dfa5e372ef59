"""The plan's bound on the work memory of attention, beside the tensors that torch really has at the same time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybrid_k2.model import mla
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.layers import RmsNorm
from hybrid_k2.model.rope import Rope
from hybrid_k2.placement import overheads
from hybrid_k2.placement.overheads import Work, workspace_bytes
from tests.memory import PeakBytes
from tests.unit.test_attention import make_attention, make_cache, make_config

MIB = 1 << 20


@pytest.mark.parametrize(("rows", "context"), [(256, 256), (256, 2048), (64, 4096), (8, 4096)])
def test_attention_stays_within_the_bound_and_comes_near_it(
    rows: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With work buffers as small as this model; they are there so that memory does not grow with all scores."""
    monkeypatch.setattr(mla, "WORK_BYTES", MIB)
    monkeypatch.setattr(overheads, "WORK_BYTES", MIB)
    config = make_config(
        hidden_size=512, num_attention_heads=8, q_lora_rank=128, kv_lora_rank=256, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, vocab_size=256, intermediate_size=256, moe_intermediate_size=32,
    )  # fmt: skip
    attention, _ = make_attention(config)
    narrow = {name: getattr(attention, name).bfloat16() for name in ("q_a", "q_b", "kv_a", "kv_b", "o")}
    norms = {
        name: RmsNorm(getattr(attention, name).weight.bfloat16(), config.latent_norm_eps)
        for name in ("q_a_norm", "kv_a_norm")
    }
    attention = replace(attention, **narrow, **norms)
    cache = make_cache(config, context, "bf16")
    for layer in cache.layers:
        layer.normal_()
    pages = cache.pool.allocate(cache.pages_for(context))
    batch = Batch.build([Chunk(list(range(rows)), context - rows, pages)])
    rotation = Rope(config).rotation(torch.arange(context - rows, context))
    x = torch.randn(rows, 512).bfloat16()
    with torch.inference_mode(), PeakBytes() as memory:
        attention(x, batch, cache, rotation)
    work = Work(config, "cuda:0", "bf16", rows, context_tokens=context, sequences=1)
    assert memory.peak <= workspace_bytes(work)
    if rows > 64:
        assert memory.peak > workspace_bytes(work) / 3

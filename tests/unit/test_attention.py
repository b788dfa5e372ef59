from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from hybrid_k2.config import ModelConfig
from hybrid_k2.model import layers, mla
from hybrid_k2.model.attention import Attention
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layers import RmsNorm
from hybrid_k2.model.mla import MlaShape
from hybrid_k2.model.rope import Rope
from hybrid_k2.placement.plan import KvCachePlan
from tests.generators import config_dict
from tests.memory import LargestResult
from tests.reference import mla as oracle

SIZES = [
    {},
    {
        "hidden_size": 160,
        "num_attention_heads": 3,
        "q_lora_rank": 37,
        "kv_lora_rank": 29,
        "qk_nope_head_dim": 13,
        "qk_rope_head_dim": 6,
        "v_head_dim": 11,
    },
    {"num_attention_heads": 1, "qk_nope_head_dim": 32, "v_head_dim": 5, "kv_lora_rank": 8, "q_lora_rank": 3},
]
# A sum of n fp32 products errs by about sqrt(n) * 2^-24 of its size. From x to the output at most 8 of them follow each
# other (q_a, q_b, W_UK, scores, weighted sum, W_UV, o; kv_a beside), n is at most 160, and outputs are at most 5.
CLOSE = {"rtol": 0.0, "atol": 8 * 160**0.5 * 2**-24 * 5}


def make_config(**overrides: object) -> ModelConfig:
    return ModelConfig.from_dict(config_dict(packed=False, **overrides), "test")


def make_attention(config: ModelConfig, seed: int = 0) -> tuple[Attention, dict[str, Tensor]]:
    """Return layer 1's attention with random weights, and those weights by their checkpoint names."""
    source = torch.Generator().manual_seed(seed)
    heads = config.num_attention_heads
    shapes = {
        "q_a_proj": (config.q_lora_rank, config.hidden_size),
        "q_b_proj": (heads * config.qk_head_dim, config.q_lora_rank),
        "kv_a_proj_with_mqa": (config.latent_dim, config.hidden_size),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj": (config.hidden_size, heads * config.v_head_dim),
    }
    w = {name: torch.randn(shape, generator=source) / shape[1] ** 0.5 for name, shape in shapes.items()}
    w["q_a_layernorm"] = 1 + 0.2 * torch.randn(config.q_lora_rank, generator=source)
    w["kv_a_layernorm"] = 1 + 0.2 * torch.randn(config.kv_lora_rank, generator=source)
    eps = config.latent_norm_eps
    attention = Attention(
        layer=1,
        shape=MlaShape.of(config),
        q_a=w["q_a_proj"],
        q_a_norm=RmsNorm(w["q_a_layernorm"], eps),
        q_b=w["q_b_proj"],
        kv_a=w["kv_a_proj_with_mqa"],
        kv_a_norm=RmsNorm(w["kv_a_layernorm"], eps),
        kv_b=w["kv_b_proj"],
        o=w["o_proj"],
    )
    return attention, w


def make_cache(config: ModelConfig, tokens: int = 4096, dtype: str = "fp32") -> LatentCache:
    return LatentCache(KvCachePlan("host", dtype, tokens, 64, 0), config)


def run(
    attention: Attention, config: ModelConfig, cache: LatentCache, parts: list[tuple[Tensor, int, list[int]]]
) -> list[Tensor]:
    """Attend for (rows, cached, pages) of several sequences in one batch."""
    batch = Batch.build([Chunk([0] * len(rows), cached, pages) for rows, cached, pages in parts])
    rotation = Rope(config).rotation(batch.positions)
    out = attention(torch.cat([rows for rows, _, _ in parts]), batch, cache, rotation)
    return [out[sequence.rows] for sequence in batch.sequences]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 65, 300])
def test_whole_prefill_equals_the_oracle(sizes: dict[str, int], tokens: int) -> None:
    config = make_config(**sizes)
    attention, weights = make_attention(config, tokens)
    x = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(tokens))
    cache = make_cache(config)
    (got,) = run(attention, config, cache, [(x, 0, cache.pool.allocate(cache.pages_for(tokens)))])
    torch.testing.assert_close(got.double(), oracle.attention(x, weights, config), **CLOSE)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", SIZES)
def test_mixed_batches_equal_the_oracle(sizes: dict[str, int], seed: int) -> None:
    """Sequences of different lengths advance by chunks of different sizes, decode steps among them."""
    config = make_config(**sizes)
    attention, weights = make_attention(config, seed)
    chance = random.Random(seed)
    cache = make_cache(config)
    source = torch.Generator().manual_seed(seed)
    xs = [torch.randn(chance.randint(1, 200), config.hidden_size, generator=source) for _ in range(4)]
    free = chance.sample(range(cache.pool.pages), cache.pool.pages)
    pages = [[free.pop() for _ in range(cache.pages_for(len(x)))] for x in xs]
    got: list[list[Tensor]] = [[] for _ in xs]
    done = [0] * len(xs)
    while active := [i for i, x in enumerate(xs) if done[i] < len(x)]:
        active = chance.sample(active, chance.randint(1, len(active)))
        sizes_now = [chance.choice([1, 1, chance.randint(1, 130)]) for _ in active]
        parts = [(xs[i][done[i] : done[i] + n], done[i], pages[i]) for i, n in zip(active, sizes_now, strict=True)]
        for i, out in zip(active, run(attention, config, cache, parts), strict=True):
            got[i].append(out)
            done[i] += len(out)
    for x, outs in zip(xs, got, strict=True):
        torch.testing.assert_close(torch.cat(outs).double(), oracle.attention(x, weights, config), **CLOSE)


def absorbed_attention(q: Tensor, latent: Tensor, kv_b: Tensor, shape: MlaShape) -> Tensor:
    context = mla.latent_attention(mla.absorb_queries(q, kv_b, shape), latent, shape)
    return mla.expand_values(context, kv_b, shape)


def random_state(shape: MlaShape, queries: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(queries * 1000 + tokens)
    q = torch.randn(queries, shape.heads, shape.nope + shape.rope, generator=source)
    latent = torch.randn(tokens, shape.kv_lora + shape.rope, generator=source)
    kv_b = torch.randn(shape.heads, shape.nope + shape.value, shape.kv_lora, generator=source) / shape.kv_lora**0.5
    return q, latent, kv_b


@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (1, 700), (7, 7), (130, 513)])
@pytest.mark.parametrize("sizes", SIZES)
def test_absorbed_equals_naive(sizes: dict[str, int], queries: int, tokens: int) -> None:
    shape = MlaShape.of(make_config(**sizes))
    state = random_state(shape, queries, tokens)
    naive, absorbed = mla.naive_attention(*state, shape), absorbed_attention(*state, shape)
    torch.testing.assert_close(absorbed, naive, **CLOSE)
    assert naive.abs().max() > 1e-2


@pytest.mark.parametrize("attend", [mla.naive_attention, absorbed_attention])
def test_blocks_do_not_change_the_result(attend, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    shape = MlaShape.of(make_config(num_attention_heads=5))
    state = random_state(shape, 150, 400)
    whole = attend(*state, shape)
    for work_bytes in (1, 4 * 5 * 400 * 7, 100_000):
        monkeypatch.setattr(mla, "WORK_BYTES", work_bytes)
        torch.testing.assert_close(attend(*state, shape), whole, **CLOSE)


@pytest.mark.parametrize("attend", [mla.naive_attention, absorbed_attention])
def test_work_memory_is_bounded(attend, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    work_bytes = 1 << 20
    monkeypatch.setattr(mla, "WORK_BYTES", work_bytes)
    shape = MlaShape.of(make_config(num_attention_heads=6))
    queries, tokens = 200, 3000
    state = random_state(shape, queries, tokens)
    with LargestResult() as largest:
        attend(*state, shape)
    results = 4 * shape.heads * queries * (shape.kv_lora + shape.rope)
    assert results < work_bytes  # so that the bound is about scores and keys: all scores would take 14 times of it
    assert work_bytes // 2 < largest.nbytes <= work_bytes


def test_decoding_widens_neither_a_matrix_nor_the_history_as_a_whole() -> None:
    """Fresh memory for either would cost more than all that the step computes with it."""
    wide = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    config = make_config(num_attention_heads=16, q_lora_rank=16, **wide)
    attention, _ = make_attention(config)
    kv_b = attention.kv_b.bfloat16()
    bf16 = dataclasses.replace(attention, kv_b=kv_b)
    widened = dataclasses.replace(attention, kv_b=kv_b.float())
    cache = make_cache(config, 4096, "bf16")
    cache.layers[1].copy_(torch.randn(cache.layers[1].shape))
    part = [(torch.randn(1, config.hidden_size), 4000, list(range(64)))]
    limit = 4 * layers.WIDENED_NUMBERS
    assert 4 * kv_b.numel() > limit
    assert 4 * cache.layers[1].numel() > limit
    with LargestResult() as largest:
        (got,) = run(bf16, config, cache, part)
    assert limit // 2 <= largest.nbytes <= limit
    (expected,) = run(widened, config, cache, part)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("work_bytes", [1, 50_000, 1 << 26])
def test_steep_scores_in_any_order_are_exact(work_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of some hundred would overflow if they were not taken relative to the highest; here in float64."""
    monkeypatch.setattr(mla, "WORK_BYTES", work_bytes)
    shape = MlaShape.of(make_config(num_attention_heads=2))
    q = 200 * torch.randn(2, 9, shape.kv_lora + shape.rope, dtype=torch.float64)
    latent = torch.randn(70, shape.kv_lora + shape.rope, dtype=torch.float64)
    for steep in (latent, latent * torch.arange(70)[:, None] / 30, latent * torch.arange(70).flip(0)[:, None] / 30):
        scores = (q @ steep.T) * shape.scale  # [heads, 9, 70]
        assert scores.abs().max() > 750  # exp overflows from 710 on
        scores.masked_fill_(torch.ones(9, 70, dtype=torch.bool).triu(62), -torch.inf)
        expected = scores.softmax(-1) @ steep[:, : shape.kv_lora]
        torch.testing.assert_close(mla.latent_attention(q, steep, shape), expected, rtol=0, atol=1e-10)


def test_chooses_the_form_with_fewer_multiplications() -> None:
    shape = MlaShape(heads=64, nope=128, rope=64, value=128, kv_lora=512, scale=1.0)
    assert all(shape.prefer_absorbed(1, tokens) for tokens in (2, 100, 262144))
    assert shape.prefer_absorbed(128, 65536)
    assert not shape.prefer_absorbed(512, 65536)
    assert not any(shape.prefer_absorbed(tokens, tokens) for tokens in (2, 100, 4096))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_stays_close_in_bf16(dtype: str) -> None:
    config = make_config()
    attention, weights = make_attention(config)
    names = ("q_a", "q_b", "kv_a", "kv_b", "o")
    norms = {
        name: RmsNorm(getattr(attention, name).weight.bfloat16(), config.latent_norm_eps)
        for name in ("q_a_norm", "kv_a_norm")
    }
    narrow = Attention(
        layer=1, shape=attention.shape, **{name: getattr(attention, name).bfloat16() for name in names}, **norms
    )
    x = torch.randn(90, config.hidden_size, generator=torch.Generator().manual_seed(5))
    cache = make_cache(config, dtype=dtype)
    (got,) = run(narrow, config, cache, [(x.bfloat16(), 0, [0, 1])])
    assert got.dtype == torch.bfloat16
    expected = oracle.attention(x, weights, config)
    error = (got.double() - expected).norm() / expected.norm()
    assert error < 8 * 2**-8  # a handful of bf16 roundings in a row, each of relative size 2^-9 to 2^-8


def test_runs_on_the_device_of_its_weights() -> None:
    """Weights and cache lie on another device (one without values), rows and page numbers on the host."""
    config = make_config()
    attention, _ = make_attention(config)
    parts = {f.name: getattr(attention, f.name) for f in dataclasses.fields(attention)}
    for name, part in parts.items():
        if isinstance(part, Tensor):
            parts[name] = part.to("meta")
        elif isinstance(part, RmsNorm):
            parts[name] = RmsNorm(part.weight.to("meta"), part.eps)
    cache = LatentCache(KvCachePlan("host", "bf16", 4096, 64, 0), config, "meta")
    chunks = [Chunk([0] * 150, 0, [0, 1, 2]), Chunk([0] * 3, 100, [9, 4]), Chunk([0], 70, [30, 31])]
    batch = Batch.build(chunks)
    rotation = Rope(config).rotation(batch.positions).to(torch.device("meta"))
    out = Attention(**parts)(torch.randn(154, config.hidden_size), batch, cache, rotation)
    assert out.device.type == "meta"
    assert out.shape == (154, config.hidden_size)

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_k2.errors import EngineError
from hybrid_k2.experts import open_experts
from hybrid_k2.model import mla
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.mla import MlaShape
from hybrid_k2.model.native_attention import NativeAttention
from tests.generators import write_checkpoint
from tests.models import loaded
from tests.reference import mla as oracle
from tests.unit.test_attention import CLOSE, SIZES, make_attention, make_cache, make_config, run

K2_6_HEADS = {"nope": 128, "rope": 64, "value": 128, "kv_lora": 512}
SHAPES = [
    MlaShape(heads=4, nope=16, rope=8, value=16, kv_lora=32, scale=0.2),
    MlaShape(heads=3, nope=13, rope=6, value=11, kv_lora=29, scale=0.3),
    MlaShape(heads=1, nope=1, rope=2, value=1, kv_lora=1, scale=1.0),
    MlaShape(heads=37, nope=8, rope=2, value=5, kv_lora=61, scale=0.4),
    MlaShape(heads=5, **K2_6_HEADS, scale=0.1),
]
DTYPES = [torch.bfloat16, torch.float32]


@contextmanager
def native_attention(shape: MlaShape, threads: int = 2) -> Iterator[NativeAttention]:
    """Open it on threads of its own; skips where torch attends instead."""
    runtime = open_experts("exact", threads)
    try:
        native = NativeAttention.open(runtime, shape)
        if native is None:
            pytest.skip("this machine has no vector kernels for attention")
        yield native
    finally:
        runtime.close()


@dataclasses.dataclass
class State:
    """A batch of sequences with filled pages."""

    shape: MlaShape
    q: Tensor  # [T, heads, nope + rope]
    kv_b: Tensor  # [heads * (nope + value), kv_lora]
    pages: Tensor  # [pages, page_tokens, kv_lora + rope]
    batch: Batch

    def attend(self, native: NativeAttention, spans: Tensor | None = None) -> Tensor:
        out = torch.full((*self.q.shape[:2], self.shape.value), torch.nan)
        spans = self.batch.spans if spans is None else spans
        native.attend(self.q, self.kv_b, self.pages, self.batch.page_table, spans, out)
        return out

    def by_torch(self) -> Tensor:
        """The same by the torch functions, each sequence by itself."""
        kv_b = self.kv_b.view(self.shape.heads, -1, self.shape.kv_lora)
        parts = []
        for sequence in self.batch.sequences:
            latent = self.pages[sequence.pages].flatten(0, 1)[: sequence.length]
            q = mla.absorb_queries(self.q[sequence.rows], kv_b, self.shape)
            parts.append(mla.expand_values(mla.latent_attention(q, latent, self.shape), kv_b, self.shape))
        return torch.cat(parts)

    def least_lead(self) -> float:
        """The least difference of a row's two highest scores."""
        kv_b, leads = self.kv_b.view(self.shape.heads, -1, self.shape.kv_lora), []
        for sequence in self.batch.sequences:
            latent = self.pages[sequence.pages].flatten(0, 1)[: sequence.length]
            scores = mla.absorb_queries(self.q[sequence.rows], kv_b, self.shape) @ latent.T * self.shape.scale
            for behind, row in enumerate(scores.transpose(0, 1).flip(0)):  # [heads, length]; the last sees every token
                first, second = row[:, : sequence.length - behind].topk(2).values.T
                leads.append((first - second).min().item())
        return min(leads)


def random_state(
    shape: MlaShape, lengths: list[tuple[int, int]], dtype: torch.dtype = torch.bfloat16, page_tokens: int = 64
) -> State:
    """Draw a state for these (cached, new tokens); pages in any order, with room behind a sequence's end."""
    needed = [-(-(cached + new) // page_tokens) for cached, new in lengths]
    free = torch.randperm(sum(needed) + 3).tolist()
    chunks = [
        Chunk([0] * new, cached, [free.pop() for _ in range(count)])
        for (cached, new), count in zip(lengths, needed, strict=True)
    ]
    tokens = sum(new for _, new in lengths)
    return State(
        shape,
        torch.randn(tokens, shape.heads, shape.nope + shape.rope),
        (torch.randn(shape.heads * (shape.nope + shape.value), shape.kv_lora) / shape.kv_lora**0.5).to(dtype),
        torch.randn(sum(needed) + 3, page_tokens, shape.kv_lora + shape.rope).to(dtype),
        Batch.build(chunks),
    )


def tolerance(shape: MlaShape) -> float:
    """Bound the error of either: sums of n products, and of scores of up to about 30 that become weights, in fp32."""
    n = max(shape.nope, shape.kv_lora, shape.value, 100)
    return 8 * n**0.5 * 30 * 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape: MlaShape, dtype: torch.dtype) -> None:
    lengths = [(random.randint(0, 400), random.choice([1, random.randint(2, 50)])) for _ in range(3)]
    state = random_state(shape, lengths, dtype, random.choice([1, 7, 64]))
    with native_attention(shape) as native:
        got = state.attend(native)
    torch.testing.assert_close(got, state.by_torch(), rtol=0.0, atol=tolerance(shape))


def test_equals_torch_behind_a_long_context() -> None:
    """Beyond 6144 tokens ranges grow: 96, 192, 384 keys."""
    shape = MlaShape(heads=2, nope=8, rope=4, value=8, kv_lora=16, scale=0.3)
    state = random_state(shape, [(13_001, 1), (7_000, 2)])
    with native_attention(shape) as native:
        got = state.attend(native)
    torch.testing.assert_close(got, state.by_torch(), rtol=0.0, atol=tolerance(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company_chunk_and_number_of_threads(shape: MlaShape) -> None:
    state = random_state(shape, [(97, 1), (0, 40), (190, 5), (3, 2)])
    with native_attention(shape, 1) as native:
        whole = state.attend(native)
        assert not whole.isnan().any()
        for span, sequence in zip(state.batch.spans, state.batch.sequences, strict=True):
            alone = state.attend(native, span[None])
            assert torch.equal(alone[sequence.rows], whole[sequence.rows])
            assert int(alone.isnan().all(2).all(1).logical_not().sum()) == sequence.stop - sequence.start
            first, rows, cached, page = span.tolist()
            tokens = torch.tensor([[first + t, 1, cached + t, page] for t in range(rows)])
            one_by_one = state.attend(native, tokens[torch.randperm(rows)])
            assert torch.equal(one_by_one[sequence.rows], whole[sequence.rows])
    for threads in (2, 5):
        with native_attention(shape, threads) as native:
            assert torch.equal(state.attend(native), whole)


def test_memory_behind_the_end_of_a_sequence_is_not_read() -> None:
    shape = SHAPES[1]
    state = random_state(shape, [(60, 3), (127, 1)])
    with native_attention(shape) as native:
        expected = state.attend(native)
        used = torch.zeros(state.pages.shape[:2], dtype=torch.bool)
        for sequence in state.batch.sequences:
            positions = torch.arange(sequence.length)
            used[sequence.pages[positions // 64], positions % 64] = True
        state.pages[~used] = torch.nan
        assert torch.equal(state.attend(native), expected)


def test_a_nan_stays_in_its_rows() -> None:
    shape = SHAPES[0]
    state = random_state(shape, [(150, 1), (20, 3), (0, 4)])
    with native_attention(shape) as native:
        expected = state.attend(native)
        state.q[2, 1, 3] = torch.nan  # the second token of the second sequence, one head
        state.q[4, 2, 0] = torch.inf
        got = state.attend(native)
        bad = torch.zeros(got.shape[:2], dtype=torch.bool)
        bad[2, 1] = bad[4, 2] = True
        assert got[bad].isnan().all()
        assert torch.equal(got[~bad], expected[~bad])
        page, slot = state.batch.sequences[0].pages[1], 9  # token 73 of the first sequence
        state.pages[page, slot, 5] = torch.nan
        got = state.attend(native)
        assert got[0].isnan().all()
        assert torch.equal(got[1:][~bad[1:]], expected[1:][~bad[1:]])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4])
def test_scores_of_any_size(size: float) -> None:
    """All keys alike for queries of zero, and weights of zero and one for steep scores; nothing overflows."""
    shape = SHAPES[0]
    while True:
        state = random_state(shape, [(300, 2)], torch.float32)
        state.q *= size
        if size <= 1 or state.least_lead() > 20:  # of steep scores two that almost tie would not be zero and one
            break
    with native_attention(shape) as native:
        got = state.attend(native)
    torch.testing.assert_close(got, state.by_torch(), rtol=0.0, atol=tolerance(shape))


@pytest.mark.parametrize("sizes", SIZES)
def test_chunks_of_a_prompt_equal_the_oracle(sizes: dict[str, int]) -> None:
    """A prompt and then decode steps through the whole attention, in float64 beside."""
    config = make_config(**sizes)
    attention, weights = make_attention(config)
    x = torch.randn(230, config.hidden_size)
    cache = make_cache(config)
    pages = [9, 2, 30, 4]
    with native_attention(attention.shape) as native:
        attention = dataclasses.replace(attention, native=native)
        done, outs = 0, []
        for size in (200, 1, 1, 20, 8):
            (out,) = run(attention, config, cache, [(x[done : done + size], done, pages)])
            outs.append(out)
            done += size
    torch.testing.assert_close(torch.cat(outs).double(), oracle.attention(x, weights, config), **CLOSE)


def test_mixes_both_forms_in_a_batch() -> None:
    config = make_config()
    attention, _ = make_attention(config)
    parts = [(torch.randn(size, config.hidden_size), 0, pages) for size, pages in [(150, [7, 8, 9]), (70, [1, 3])]]
    results = []
    with native_attention(attention.shape) as native:
        for layer in (attention, dataclasses.replace(attention, native=native)):
            cache = make_cache(config)
            run(layer, config, cache, parts)
            steps = [(part[-1:] * 0.5, len(part), pages) for part, _, pages in parts]
            torch.manual_seed(0)
            steps.insert(1, (torch.randn(90, config.hidden_size), 0, [20, 21]))
            results.append(torch.cat(run(layer, config, cache, steps)))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_refuses_what_does_not_fit() -> None:
    shape = SHAPES[0]
    state = random_state(shape, [(150, 1), (20, 3)])
    with native_attention(shape) as native:
        for change, message in [
            ({"q": state.q[:, :3]}, r"q: expected shape \[4, 4, 24\], got \[4, 3, 24\]"),
            ({"q": state.q.double()}, "q: expected contiguous float32, got float64"),
            ({"kv_b": state.kv_b[1:]}, "kv_b: expected shape"),
            ({"pages": state.pages[..., 1:]}, "pages: expected shape"),
            ({"pages": state.pages[:1]}, "page_table: expected pages below 1"),
        ]:
            with pytest.raises(ValueError, match=message):
                dataclasses.replace(state, **change).attend(native)
        far = torch.tensor([[0, 1, 100_000, 0]])
        with pytest.raises(ValueError, match=r"page_table: expected pages for 100000 \+ 1 tokens, got room for 256"):
            state.attend(native, far)
        with pytest.raises(ValueError, match=r"sequences: expected rows of 4, got 4 \+ 1 behind 0 tokens from page 0"):
            state.attend(native, torch.tensor([[4, 1, 0, 0]]))


def test_needs_running_threads() -> None:
    shape = SHAPES[0]
    state = random_state(shape, [(5, 1)])
    with native_attention(shape) as native:
        pass
    with pytest.raises(EngineError):
        state.attend(native)


def test_torch_attends_without_vector_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for numerics, isa in (("reference", None), ("exact", "portable")):
        if isa:
            monkeypatch.setenv("HYBRID_K2_ISA", isa)
        runtime = open_experts(numerics, 1)
        assert NativeAttention.open(runtime, SHAPES[0]) is None
        runtime.close()


def test_layers_on_the_host_share_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, seed=5)
    with loaded(folder) as tiny:  # by the rules for reference numerics
        assert {layer.attention.native for layer in tiny.model.layers} == {None}
    with loaded(folder, "host") as tiny:
        natives = {layer.attention.native for layer in tiny.model.layers}
        assert len(natives) == 1
        assert (natives == {None}) == (NativeAttention.open(tiny.model.experts_runtime, SHAPES[0]) is None)

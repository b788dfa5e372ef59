"""The native small operations against float64, against torch, and the same bits in any batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.model import host_rows
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.host_rows import on_host
from hybrid_k2.model.layers import RmsNorm, rms_norm
from hybrid_k2.model.mla import MlaShape
from hybrid_k2.model.native_attention import NativeAttention
from hybrid_k2.model.rope import Rotation
from hybrid_k2.model.router import Router
from tests.unit.experts_common import native_runtime

U = 2.0**-24  # of one rounding
SIZES = [1, 3, 4, 15, 16, 17, 255, 256, 257, 1000, 7168]
MANY = 1 << 17  # numbers from which on the threads share the work


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_rms_norm_equals_float64(n: int, dtype: torch.dtype, scale: float) -> None:
    x, weight = scale * torch.randn(7, n), torch.randn(n).to(dtype)
    expected = rms_norm(x.double(), weight.double(), 1e-5)
    # Half of the sum's 20 roundings, for a root follows; then mean, epsilon, root, quotient and two products.
    torch.testing.assert_close(host_rows.rms_norm(threads(), x, weight, 1e-5).double(), expected, rtol=15 * U, atol=0)


@pytest.mark.parametrize("n", SIZES)
def test_silu_times_equals_float64(n: int) -> None:
    gate, up = 20 * torch.randn(7, n), torch.randn(7, n)
    expected = functional.silu(gate.double()) * up.double()
    # 4 roundings of the exponential, then sum, quotient and product; below the normal numbers an absolute error.
    got = host_rows.silu_times(threads(), gate, up).double()
    torch.testing.assert_close(got, expected, rtol=6 * U, atol=1e-36)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, -90.0, -1e30, 1e30, 0.0, -0.0, 1e-42])
def test_special_values_are_those_of_torch(special: float) -> None:
    x, other = torch.randn(3, 21), torch.rand(3, 21)
    x[1, 13] = special
    torch.testing.assert_close(
        host_rows.silu_times(threads(), x, other), functional.silu(x) * other, rtol=1e-6, atol=1e-36, equal_nan=True
    )
    torch.testing.assert_close(
        host_rows.rms_norm(threads(), x, other[0], 1e-5), rms_norm(x, other[0], 1e-5), rtol=2e-6, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(("experts", "top"), [(24, 6), (384, 8), (7, 1), (5, 5), (33, 32)])
@pytest.mark.parametrize("normalise", [True, False])
def test_route_equals_float64(experts: int, top: int, normalise: bool) -> None:
    logits, bias = 3 * torch.randn(50, experts + 5), 0.3 * torch.randn(experts)
    ids, weights = host_rows.route(threads(), logits, bias, top, normalise, 2.5)
    scores = logits[:, :experts].double().sigmoid()
    biased = scores + bias
    assert (ids.long().sort(dim=1).values.diff(dim=1) > 0).all()
    chosen = biased.gather(1, ids.long())
    bound = 8 * U  # of a score of at most 1 with a bias of about as much
    assert (chosen.diff(dim=1) <= bound).all()
    torch.testing.assert_close(chosen, biased.sort(dim=1, descending=True).values[:, :top], rtol=0, atol=bound)
    expected = scores.gather(1, ids.long())
    if normalise:
        expected /= expected.sum(1, keepdim=True)
    # Of the score 6, of the sum 6 + top, then quotient and product.
    torch.testing.assert_close(weights.double(), 2.5 * expected, rtol=(14 + top) * U, atol=0)


def test_ties_and_nan_rank_as_in_torch() -> None:
    """Numbers whose sigmoid and sum are exact in both, so that the order is the same to the last tie."""
    for _ in range(50):
        logits = torch.tensor([0.0, math.inf, math.nan])[torch.randint(0, 3, (4, 40))]
        bias = torch.randint(-2, 3, (40,)) / 4
        router = Router(torch.empty(40, 0), bias, 9, False, 1.0)
        expected = router.route(logits)
        ids, weights = host_rows.route(threads(), logits, bias, 9, False, 1.0)
        assert torch.equal(ids, expected.ids)
        torch.testing.assert_close(weights, expected.weights, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("n", [40, 131])
def test_a_row_has_the_same_bits_in_any_batch(workers: int, n: int) -> None:
    """Also where so many rows come that the threads share them."""
    own, count = threads(workers), 2 * MANY // n
    x, up, weight, bias = torch.randn(count, n), torch.randn(count, n), torch.rand(n), torch.randn(n)
    functions: list[Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = [
        lambda a, b: (host_rows.rms_norm(own, a, weight, 1e-5),),
        lambda a, b: (host_rows.silu_times(own, a, b),),
        lambda a, b: host_rows.route(own, a, bias, 8, True, 1.5),
    ]
    for function in functions:
        whole = function(x, up)
        for first in (0, 1, count // 2, count - 3):
            rows = slice(first, first + 3)
            for part, all_rows in zip(function(x[rows], up[rows]), whole, strict=True):
                assert torch.equal(part, all_rows[rows])


def test_no_rows() -> None:
    empty = torch.empty(0, 8)
    assert host_rows.rms_norm(threads(), empty, torch.ones(8), 1e-5).shape == (0, 8)
    assert host_rows.silu_times(threads(), empty, empty).shape == (0, 8)
    assert host_rows.route(threads(), empty, torch.ones(8), 2, True, 1.0)[0].shape == (0, 2)


def test_rows_need_not_be_contiguous() -> None:
    x, weight = torch.randn(9, 50), torch.rand(30)
    assert torch.equal(
        host_rows.rms_norm(threads(), x[:, 7:37], weight, 1e-5),
        host_rows.rms_norm(threads(), x[:, 7:37].contiguous(), weight, 1e-5),
    )


def test_only_fp32_on_the_host_is_taken() -> None:
    x = torch.zeros(2, 3)
    assert on_host(x, x)
    assert not on_host(x, x.bfloat16())
    assert not on_host(x.to("meta"))
    assert RmsNorm(torch.ones(3).bfloat16(), 1e-5, threads=threads())(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: host_rows.rms_norm(r, torch.ones(2, 3), torch.ones(4), 1e-5), r"weight: expected shape \[3\], got"),
        (lambda r: host_rows.silu_times(r, torch.ones(2, 3), torch.ones(2, 4)), r"up: expected shape \[2, 3\], got"),
        (lambda r: host_rows.route(r, torch.ones(2, 3), torch.ones(4), 2, True, 1.0), r"logits: expected at least 4"),
        (lambda r: host_rows.route(r, torch.ones(2, 3), torch.ones(3), 4, True, 1.0), r"ids: expected 1\.\.3 columns"),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[object], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(threads())


def test_rotation_is_that_of_torch_bit_for_bit_and_latents_are_normed() -> None:
    case = AppendCase(heads=3, nope=5, rope=6, kv_lora=37)
    for dtype in (torch.float32, torch.bfloat16):
        pages, q = case.pages.to(dtype), case.q.clone()
        case.append(q, pages)
        assert torch.equal(q[..., :5], case.q[..., :5])
        assert torch.equal(q[..., 5:], case.rotation.apply(case.q[..., 5:]))
        latents = pages.flatten(0, 1)[case.slots]  # [T, kv_lora + rope]
        assert torch.equal(latents[:, 37:], case.rotation.apply(case.latent[:, 37:43]).to(dtype))
        normal = host_rows.rms_norm(threads(), case.latent[:, :37], case.norm.weight, case.norm.eps)
        assert torch.equal(latents[:, :37], normal.to(dtype))
        untouched = torch.ones(len(pages) * 4, dtype=torch.bool)
        untouched[case.slots] = False
        assert torch.equal(pages.flatten(0, 1)[untouched], case.pages.to(dtype).flatten(0, 1)[untouched])


def test_appending_many_rows_gives_the_bits_of_few() -> None:
    case = AppendCase(heads=64, nope=1, rope=8, kv_lora=40, cached=(3,), rows=(700,))
    pages, q = case.pages.clone(), case.q.clone()
    case.append(q, pages)
    alone, q_alone = case.pages.clone(), case.q[5:9].clone()
    chunk = Batch.build([Chunk([0] * 4, 3 + 5, case.batch.sequences[0].pages)])
    rotation = Rotation(case.rotation.cos[5:9], case.rotation.sin[5:9])
    case.native.append(case.latent[5:9].clone(), case.norm, rotation, q_alone, chunk, alone)
    assert torch.equal(q_alone, q[5:9])
    assert torch.equal(alone.flatten(0, 1)[case.slots[5:9]], pages.flatten(0, 1)[case.slots[5:9]])


def test_a_page_that_does_not_exist_is_refused_before_anything_is_written() -> None:
    case = AppendCase(heads=1, nope=2, rope=2, kv_lora=4)
    q, pages = case.q.clone(), case.pages[:1].clone()
    with pytest.raises(ValueError, match="page_table: expected pages below 1"):
        case.append(q, pages)
    assert torch.equal(q, case.q)


class AppendCase:
    """Some sequences, with pages of 4 tokens in any order."""

    def __init__(
        self,
        heads: int,
        nope: int,
        rope: int,
        kv_lora: int,
        cached: tuple[int, ...] = (0, 9, 3),
        rows: tuple[int, ...] = (5, 1, 2),
    ) -> None:
        counts = [-(-(before + new) // 4) for before, new in zip(cached, rows, strict=True)]
        tables = torch.split(torch.randperm(sum(counts)), counts)
        chunks = [Chunk([0] * new, before, own) for new, before, own in zip(rows, cached, tables, strict=True)]
        self.batch = Batch.build(chunks)
        tokens = sum(rows)
        self.slots = torch.cat(
            [
                own[torch.arange(before, before + new) // 4] * 4 + torch.arange(before, before + new) % 4
                for own, before, new in zip(tables, cached, rows, strict=True)
            ]
        )
        self.rotation = Rotation(torch.randn(tokens, rope // 2), torch.randn(tokens, rope // 2))
        self.norm = RmsNorm(torch.rand(kv_lora).bfloat16(), 1e-6)
        self.latent, self.q = torch.randn(tokens, kv_lora + rope + 3), torch.randn(tokens, heads, nope + rope)
        self.pages = torch.randn(sum(counts), 4, kv_lora + rope)
        self.native = NativeAttention(threads(), MlaShape(heads, nope, rope, 8, kv_lora, 1.0))

    def append(self, q: Tensor, pages: Tensor) -> None:
        self.native.append(self.latent, self.norm, self.rotation, q, self.batch, pages)


def threads(count: int = 2) -> object:
    return native_runtime(threads=count).native

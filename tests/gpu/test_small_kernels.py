"""RMSNorm, rotation and cache, router and A16 packing against the model's own torch code and the definition of A16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_k2.model.layers import rms_norm as plain_rms_norm
from hybrid_k2.model.rope import Rotation
from hybrid_k2.model.router import Router
from tests.unit.experts_common import NOT_FINITE, set_bits

pytest.importorskip("triton", reason="triton is not installed")
from hybrid_k2.accelerator.kernels.a16 import pack_a16
from hybrid_k2.accelerator.kernels.norm_rope import append_and_rotate, rms_norm
from hybrid_k2.accelerator.kernels.router import route

# The last step of a rounding may fall differently where the sum of squares was added in another order.
STEP = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 96, 200])
def test_rms_norm(device: torch.device, dtype: torch.dtype, size: int) -> None:
    x, weight = (torch.randn(3, size) * 5).to(dtype), torch.randn(size).to(dtype)
    result = rms_norm(x.to(device), weight.to(device), 1e-5).cpu()
    torch.testing.assert_close(result, plain_rms_norm(x, weight, 1e-5), rtol=STEP[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_go_into_their_pages_and_queries_are_rotated(device: torch.device, dtype: torch.dtype) -> None:
    tokens, heads, lora, rope = 5, 19, 48, 8
    latents, norm = torch.randn(tokens, lora + rope).to(dtype), torch.randn(lora).to(dtype)
    angles = torch.randn(tokens, rope // 2) * 10
    rotation = Rotation(angles.cos(), angles.sin())
    slots = torch.randperm(24)[:tokens].int()
    slots[2] = -1  # not kept
    cache = torch.full((3, 8, lora + rope), 7.0, dtype=torch.bfloat16)
    q = torch.randn(tokens, heads, 12 + rope).to(dtype)
    absorbed = torch.zeros(tokens, heads, lora + rope)
    on_device = [
        t.to(device, copy=True) for t in (latents, norm, rotation.cos, rotation.sin, slots, cache, q, absorbed)
    ]
    latents_, norm_, cos, sin, slots_, cache_, q_, absorbed_ = on_device
    append_and_rotate(latents_, norm_, 1e-5, (cos, sin), slots_, cache_, q_[..., 12:], absorbed_[..., lora:])
    c = plain_rms_norm(latents[:, :lora], norm, 1e-5).float()
    expected = cache.clone().flatten(0, 1)
    kept = slots >= 0
    expected[slots[kept]] = torch.cat((c, rotation.apply(latents[:, lora:])), dim=-1).bfloat16()[kept]
    torch.testing.assert_close(cache_.cpu().flatten(0, 1), expected, rtol=2**-7, atol=1e-6)
    rotated = rotation.apply(q[..., 12:])
    torch.testing.assert_close(absorbed_[..., lora:].cpu(), rotated, rtol=1e-5, atol=1e-5)
    assert not absorbed_[..., :lora].any()


def test_norm_and_rope_refuse_what_they_cannot_do() -> None:
    rows = torch.zeros(2, 38)
    q = torch.zeros(2, 1, 6)
    with pytest.raises(ValueError, match="rope: expected a power of two, got 6"):
        append_and_rotate(rows, rows[0], 1e-5, (rows, rows), torch.zeros(2), torch.zeros(1, 2, 38), q, q)
    q = torch.zeros(2, 8, 1).transpose(1, 2).expand(2, 3, 8)
    with pytest.raises(ValueError, match="expected consecutive columns"):
        append_and_rotate(rows[:, ::2], rows[0], 1e-5, (rows, rows), torch.zeros(2), torch.zeros(1, 2, 38), q, q)


@pytest.mark.parametrize(
    ("experts", "top_k", "normalise"), [(5, 2, False), (24, 6, True), (7, 7, True), (384, 8, True)]
)
def test_routes_as_the_model_does(device: torch.device, experts: int, top_k: int, normalise: bool) -> None:
    """Logits in steps far above the rounding of a sigmoid, so that many tie and none is nearly tied."""
    logits = torch.randint(-6, 7, (9, experts)) / 2.0
    bias = torch.randint(-2, 3, (experts,)) / 2.0
    router = Router(torch.eye(experts), bias, top_k, normalise, 2.5)
    expected = router(logits)
    ids, weights = (t.cpu() for t in route(logits.to(device), bias.to(device), top_k, normalise, 2.5))
    assert ids.dtype == torch.int32
    assert torch.equal(ids, expected.ids)
    torch.testing.assert_close(weights, expected.weights, rtol=1e-5, atol=0)


def test_a_nan_and_infinities_leave_the_ids_in_range(device: torch.device) -> None:
    logits = torch.randn(3, 6)
    logits[0] = torch.nan
    logits[1, 4] = torch.nan
    logits[2] = -torch.inf
    ids, weights = (t.cpu() for t in route(logits.to(device), torch.zeros(6, device=device), 3, True, 1.0))
    assert ids[0].tolist() == [0, 1, 2]
    assert ids[1, 0] == 4
    assert ids[2].tolist() == [0, 1, 2]
    assert weights[0].isnan().all()
    assert weights[1].isnan().all()
    assert torch.equal(weights[2], torch.zeros(3))
    with pytest.raises(ValueError, match="expected 1 to 6, got 7"):
        route(logits, torch.zeros(6), 7, True, 1.0)


def unpack_a16(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n [T, G, 32], k [T, G] and the correction [T, G]."""
    high, low = packed[..., :32].view(torch.int8).int(), packed[..., 32:64].view(torch.int8).int()
    exponent, correction = packed[..., 64:].contiguous().view(torch.int32).unbind(-1)
    return 256 * high + low, (exponent >> 23) - 60, correction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a16_is_the_definition(device: torch.device, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 5, 32) * torch.exp2(torch.randint(-80, 66, (4, 5, 1)).float())).to(dtype)
    x[0, 0] = 0
    packed, fits = (t.cpu() for t in pack_a16(x.view(4, -1).to(device)))
    n, k, correction = unpack_a16(packed)
    largest = x.double().abs().amax(-1)
    needed = torch.ceil(torch.log2(largest / 32512)).clamp(min=-59).nan_to_num(neginf=-59)  # smallest k that fits
    assert torch.equal(fits, needed <= 60)
    assert torch.equal(k[fits].double(), needed[fits])
    expected = (x.double() * torch.exp2(-needed).unsqueeze(-1)).round()  # to nearest even
    assert torch.equal(n[fits].double(), expected[fits])
    assert not n[~fits].any()
    assert torch.equal(correction, -8 * n.sum(-1))


@pytest.mark.parametrize("bits", NOT_FINITE)
def test_a16_passes_over_no_special_value(device: torch.device, bits: int) -> None:
    x = torch.randn(2, 96)
    set_bits(x, 1, 40, bits)
    packed, fits = (t.cpu() for t in pack_a16(x.to(device)))
    assert fits.tolist() == [[True, True, True], [True, False, True]]
    assert not packed[1, 1, :64].any()
    with pytest.raises(ValueError, match="multiple of 32 columns"):
        pack_a16(x[:, :33])

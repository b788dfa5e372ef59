"""Attention of prompts by torch's fused kernels against the readable form; on the host where there is no card."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hybrid_k2.model import prompt_attention as module
from hybrid_k2.model.mla import MlaShape, naive_attention
from hybrid_k2.model.prompt_attention import prompt_attention
from hybrid_k2.model.rounding import ROUNDING, combined, difference, shake

SHAPES = [MlaShape(5, 16, 8, 24, 32, 0.2), MlaShape(8, 128, 64, 128, 512, 0.1), MlaShape(1, 32, 16, 32, 64, 0.1447)]


def inputs(shape: MlaShape, queries: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, latents and kv_b as a model has them: of size 1 where norms made them, weights by their inputs."""
    q = torch.randn(queries, shape.heads, shape.nope + shape.rope)
    latent = torch.randn(tokens, shape.kv_lora + shape.rope)
    kv_b = torch.randn(shape.heads, shape.nope + shape.value, shape.kv_lora).mul_(shape.kv_lora**-0.5)
    return q, latent.bfloat16(), kv_b.bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_naive_form_but_for_rounding(device: torch.device, shape: MlaShape) -> None:
    """Of queries, keys, values and softmax weights to bf16: weights shaken by four roundings, see rounding.py."""
    for _ in range(3):
        queries = random.randint(1, 150)
        q, latent, kv_b = inputs(shape, queries, queries + random.choice([0, 1, random.randint(2, 200)]))
        got = prompt_attention(q.to(device), latent.to(device), kv_b.to(device), shape).cpu()
        assert got.dtype == torch.float32
        expected = naive_attention(q, latent, kv_b, shape)
        shaken = kv_b.float().flatten(0, 1)
        shake(shaken, combined(*[ROUNDING["bf16"]] * 4), torch.Generator().manual_seed(random.getrandbits(60)))
        swayed = naive_attention(q, latent, shaken.view(kv_b.shape), shape)
        assert difference(got.flatten(1), expected.flatten(1), swayed.flatten(1)).within


def test_a_few_heads_at_a_time_are_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[0]
    q, latent, kv_b = inputs(shape, 20, 33)
    whole = prompt_attention(q, latent, kv_b, shape)
    monkeypatch.setattr(module, "WORK_BYTES", 2 * 33 * (16 + 8 + 24) * 2)
    assert torch.allclose(prompt_attention(q, latent, kv_b, shape), whole, atol=1e-2)
    monkeypatch.setattr(module, "WORK_BYTES", 1)
    assert torch.allclose(prompt_attention(q, latent, kv_b, shape), whole, atol=1e-2)


def test_without_a_fused_kernel_it_is_the_readable_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_fused", lambda q, k, v, mask: False)
    q, latent, kv_b = inputs(SHAPES[0], 9, 40)
    assert torch.equal(prompt_attention(q, latent, kv_b, SHAPES[0]), naive_attention(q, latent, kv_b, SHAPES[0]))


def test_the_model_loads_without_compilers() -> None:
    """Triton and torch's own compiler take seconds, and read their environment when they are first imported."""
    code = "import sys, hybrid_k2.model.loader; print(sorted({'triton', 'torch._dynamo', 'sympy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

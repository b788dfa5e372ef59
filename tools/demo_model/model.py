"""Define the trainable twin of the K2.6 text model: MLA, a dense first layer, then mixtures of experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUP = 32  # input columns that share one INT4 scale


@dataclass(frozen=True)
class Shape:
    """Name the sizes as config.json does."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 512
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    n_shared_experts: int = 1
    n_routed_experts: int = 32
    num_experts_per_tok: int = 4
    routed_scaling_factor: float = 2.827
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    first_k_dense_replace: int = 1
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    max_position_embeddings: int = 262144


ROPE_SCALING: dict[str, float | int | str] = {
    "type": "yarn",
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LOW_RANK_EPS = 1e-6  # K2.6's official code leaves q_a and kv_a norms at this default


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to symmetric INT4 with one BF16 scale for 32 input columns.

    Shapes: weight [..., out, in] -> codes [..., out, in/32, 32] in -7..7, scale [..., out, in/32, 1].
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8).to(torch.bfloat16).float()
    return (groups / scale).round().clamp(-7, 7), scale


def straight_through(weight: Tensor) -> Tensor:
    """Return the INT4 value of the weight in the forward pass and the identity in the backward pass."""
    with torch.no_grad():
        codes, scale = quantise(weight)
        change = (codes * scale).flatten(-2) - weight
    return weight + change


class GroupedLinear(torch.autograd.Function):
    """Multiply rows, sorted by expert, with the weight of their expert [E, out, in]."""

    @staticmethod
    def forward(ctx, x, weight, bounds):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        out = x.new_empty(x.shape[0], weight.shape[1])
        for e, (a, b) in enumerate(pairwise(bounds)):
            if b > a:
                torch.mm(x[a:b], weight[e].t(), out=out[a:b])
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        for e, (a, b) in enumerate(pairwise(ctx.bounds)):
            if b > a:
                torch.mm(grad[a:b], weight[e], out=dx[a:b])
                torch.mm(grad[a:b].t(), x[a:b], out=dw[e])
        return dx, dw, None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """Make a bias-free projection with variance-keeping random weights."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
    return layer


def yarn_frequencies(shape: Shape) -> Tensor:
    """Compute the rotary frequencies of K2.6's YaRN block for this head size."""
    d, base, z = shape.qk_rope_head_dim, shape.rope_theta, ROPE_SCALING
    factor, original = float(z["factor"]), float(z["original_max_position_embeddings"])

    def turns(n: float) -> float:
        return d * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(turns(float(z["beta_fast"]))), 0)
    high = min(math.ceil(turns(float(z["beta_slow"]))), d - 1)
    plain = base ** (-torch.arange(0, d, 2).float() / d)
    ramp = ((torch.arange(d // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (2i, 2i+1)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Attention(nn.Module):
    """Multi-head latent attention in its naive form."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        heads = s.num_attention_heads
        self.q_a_proj = linear(s.hidden_size, s.q_lora_rank)
        self.q_a_layernorm = RMSNorm(s.q_lora_rank, LOW_RANK_EPS)
        self.q_b_proj = linear(s.q_lora_rank, heads * (s.qk_nope_head_dim + s.qk_rope_head_dim))
        self.kv_a_proj_with_mqa = linear(s.hidden_size, s.kv_lora_rank + s.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(s.kv_lora_rank, LOW_RANK_EPS)
        self.kv_b_proj = linear(s.kv_lora_rank, heads * (s.qk_nope_head_dim + s.v_head_dim))
        self.o_proj = linear(heads * s.v_head_dim, s.hidden_size, gain=0.3)
        mscale = 0.1 * float(ROPE_SCALING["mscale_all_dim"]) * math.log(float(ROPE_SCALING["factor"])) + 1
        self.scale = (s.qk_nope_head_dim + s.qk_rope_head_dim) ** -0.5 * mscale**2

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: dict[str, Tensor] | None) -> Tensor:
        s, (rows, length, _) = self.shape, x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(rows, length, s.num_attention_heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([s.qk_nope_head_dim, s.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([s.kv_lora_rank, s.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        kv = kv.view(rows, length, s.num_attention_heads, -1).transpose(1, 2)
        k_nope, v = kv.split([s.qk_nope_head_dim, s.v_head_dim], -1)
        q = torch.cat([q_nope, rotate(q_rope, *rope)], -1)
        k_rope = rotate(k_rope[:, None], *rope).expand(-1, s.num_attention_heads, -1, -1)
        k = torch.cat([k_nope, k_rope], -1)
        # The fused CPU kernel wants one head size for keys and values.
        v = functional.pad(v, (0, k.shape[-1] - v.shape[-1]))
        if cache is not None:
            k, v = (torch.cat([cache[n], t], 2) if n in cache else t for n, t in (("k", k), ("v", v)))
            cache["k"], cache["v"] = k, v
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.o_proj(out[..., : s.v_head_dim].transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, width)
        self.up_proj = linear(hidden, width)
        self.down_proj = linear(width, hidden, gain=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Route each token to its best experts by sigmoid score plus correction bias, and add the shared expert."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        h, w, n = s.hidden_size, s.moe_intermediate_size, s.n_routed_experts
        self.shape = s
        self.gate = nn.Parameter(torch.randn(n, h) * h**-0.5)
        self.register_buffer("bias", torch.zeros(n))
        self.gate_proj = nn.Parameter(torch.randn(n, w, h) * h**-0.5)
        self.up_proj = nn.Parameter(torch.randn(n, w, h) * h**-0.5)
        self.down_proj = nn.Parameter(torch.randn(n, h, w) * w**-0.5 * 0.3)
        self.shared_experts = MLP(h, w * s.n_shared_experts)
        self.int4 = False
        self.picks = torch.zeros(n)  # tokens of the last batch for each expert; steers the correction bias

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts and their weights, both [tokens, k]."""
        scores = functional.linear(x, self.gate).sigmoid()
        chosen = (scores.detach() + self.bias).topk(self.shape.num_experts_per_tok, -1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.shape.routed_scaling_factor
        return chosen, weights

    def forward(self, x: Tensor) -> Tensor:
        size, x = x.shape, x.flatten(0, -2)
        chosen, weights = self.route(x)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        self.picks = torch.bincount(flat, minlength=self.shape.n_routed_experts)
        bounds = [0, *self.picks.cumsum(0).tolist()]
        token = order // self.shape.num_experts_per_tok
        gate, up, down = (
            straight_through(p) if self.int4 else p for p in (self.gate_proj, self.up_proj, self.down_proj)
        )
        rows = x.index_select(0, token)
        gate_up = GroupedLinear.apply(rows, torch.cat([gate, up], 1), bounds)
        a, b = gate_up.chunk(2, -1)
        inner = functional.silu(a) * b * weights.flatten()[order, None]
        out = GroupedLinear.apply(inner, down, bounds)
        return torch.zeros_like(x).index_add(0, token, out).add(self.shared_experts(x)).view(size)


class Block(nn.Module):
    def __init__(self, s: Shape, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.mlp = MLP(s.hidden_size, s.intermediate_size) if index < s.first_k_dense_replace else MoE(s)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: dict[str, Tensor] | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Map token ids to final hidden states; `logits` finishes the wanted ones."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = s = shape or Shape()
        self.embed_tokens = nn.Parameter(torch.randn(s.vocab_size, s.hidden_size) * 0.3)
        self.layers = nn.ModuleList(Block(s, i) for i in range(s.num_hidden_layers))
        self.norm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.lm_head = nn.Parameter(torch.randn(s.vocab_size, s.hidden_size) * 0.02)
        self.register_buffer("frequencies", yarn_frequencies(s), persistent=False)

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, caches: list[dict[str, Tensor]] | None = None
    ) -> Tensor:
        """Shapes: ids, positions [rows, length]; mask bool, true where a key is seen -> [rows, length, hidden]."""
        x = functional.embedding(ids, self.embed_tokens)
        angles = (positions.float()[..., None] * self.frequencies)[:, None]
        rope = (angles.cos(), angles.sin())
        for i, block in enumerate(self.layers):
            x = block(x, rope, mask, None if caches is None else caches[i])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Shapes: hidden [..., hidden] -> [..., vocab]."""
        return functional.linear(hidden, self.lm_head)

    def mixtures(self) -> list[MoE]:
        """List the MoE layers."""
        return [block.mlp for block in self.layers if isinstance(block.mlp, MoE)]

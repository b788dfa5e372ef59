"""Start two heads of the model as the circuit that copies, which small runs otherwise find late or never.

One head of the first layer looks at the previous token and writes what it was beside the current one; one head of
the second layer looks for the place whose previous token is the current token, and brings the token found there to
the output: an "induction head" (Olsson et al., 2022, arXiv:2209.11895). Names, digits and arguments of tools are
copied this way. Training goes on from there and may change all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Attention, Model

# Strength of a constant that every embedding carries: what a head needs to look at a distance, whatever is there.
CONSTANT = 1.0
# Rotary pairs point one token back; this much apart are the scores of the right token and its neighbour.
POSITION_MARGIN = 6.0
MATCH_GAIN = 1.5
READOUT = 0.02


def orthonormal(rows: int, columns: int) -> Tensor:
    """Draw a [rows, columns] matrix whose columns are orthonormal."""
    return torch.linalg.qr(torch.randn(rows, columns)).Q


@torch.no_grad()
def prime(model: Model) -> None:
    """Write the circuit into head 0 of the first two layers, and its readout into `lm_head`."""
    model.embed_tokens[:, 0] = CONSTANT
    first, second = (block.self_attn for block in list(model.layers)[:2])
    trace = look_one_back(first, model.frequencies)  # [v, hidden]: what it keeps of a token
    where = first.o_proj.weight[:, : model.shape.v_head_dim]  # [hidden, v]: where it writes that
    found = look_for_match(second, trace, where)
    code = model.embed_tokens @ found.mT
    code = code / code.norm(dim=-1, keepdim=True) * model.shape.hidden_size**0.5
    model.lm_head.add_(READOUT * code)


def look_one_back(layer: Attention, frequencies: Tensor) -> Tensor:
    """Make head 0 see the previous token alone; return what it keeps of it, [v_head_dim, hidden]."""
    s = layer.shape
    apart = float((1 - frequencies.cos()).sum()) * layer.scale
    strength = (POSITION_MARGIN / apart) ** 0.5
    size = CONSTANT / 0.3  # of the constant behind the norm, about
    pairs = torch.zeros(s.qk_rope_head_dim)
    pairs[0::2] = strength
    keys = layer.kv_a_proj_with_mqa.weight[s.kv_lora_rank :]
    keys.mul_(0.1)
    keys[:, 0] = pairs / size
    # The constant takes one of the latent dimensions of the queries; four of the others' size.
    layer.q_a_proj.weight[0] = 0
    layer.q_a_proj.weight[0, 0] = 4 / size
    latent = 4 / (1 + 15 / s.q_lora_rank) ** 0.5
    back = torch.stack([frequencies.cos(), -frequencies.sin()], -1).flatten() * strength
    head = layer.q_b_proj.weight[: s.qk_nope_head_dim + s.qk_rope_head_dim]
    head.mul_(0.1)
    head[s.qk_nope_head_dim :, 0] = back / latent
    layer.o_proj.weight[:, : s.v_head_dim] = orthonormal(s.hidden_size, s.v_head_dim)
    value = layer.kv_b_proj.weight[s.qk_nope_head_dim : s.qk_nope_head_dim + s.v_head_dim]
    value.copy_(orthonormal(s.kv_lora_rank, s.v_head_dim).mT)
    return value @ layer.kv_a_proj_with_mqa.weight[: s.kv_lora_rank]


def look_for_match(layer: Attention, trace: Tensor, where: Tensor) -> Tensor:
    """Make head 0 find the tokens that followed the current one before; return what it writes of them."""
    s = layer.shape
    nope, rope, v = s.qk_nope_head_dim, s.qk_rope_head_dim, s.v_head_dim
    layer.q_a_proj.weight[:nope] = trace[:nope]
    query = layer.q_b_proj.weight[: nope + rope]
    query.mul_(0.1)
    query[:nope, :nope] = torch.eye(nope) * MATCH_GAIN
    layer.kv_a_proj_with_mqa.weight[:nope] = where.mT[:nope]
    key = layer.kv_b_proj.weight[:nope]
    key.mul_(0.1)
    key[:, :nope] = torch.eye(nope) * MATCH_GAIN
    value = layer.kv_b_proj.weight[nope : nope + v]
    value.zero_()
    value[:, nope:] = orthonormal(s.kv_lora_rank - nope, v).mT if s.kv_lora_rank - nope >= v else 0
    layer.o_proj.weight[:, :v] = orthonormal(s.hidden_size, v)
    return layer.o_proj.weight[:, :v] @ value @ layer.kv_a_proj_with_mqa.weight[: s.kv_lora_rank]

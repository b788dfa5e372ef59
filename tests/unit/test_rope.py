from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hybrid_k2.config import ModelConfig
from hybrid_k2.model.rope import Rope, inverse_frequencies
from tests.generators import ROPE_SCALING, config_dict
from tests.reference import mla

EPS = torch.finfo(torch.float32).eps
# K2.6's frequencies at some pairs, worked out by hand from the YaRN formula with base 50000, factor 64 and 4096 tokens.
K26_FREQUENCIES = {
    0: 1.0, 1: 0.713111085, 2: 0.508527419, 4: 0.258600136, 8: 0.0668740305, 9: 0.043776656, 10: 0.0284279591,
    12: 0.0116191599, 14: 0.00446584875, 16: 0.00153729673, 18: 0.000408645987, 19: 0.000158374991,
    20: 1.80702339e-05, 24: 4.67296494e-06, 28: 1.20842937e-06, 31: 4.38220646e-07,
}  # fmt: skip


def make_config(**overrides: object) -> ModelConfig:
    return ModelConfig.from_dict(config_dict(**overrides), "test")


def test_frequencies_of_the_real_configuration(kimi_data: Path) -> None:
    config = ModelConfig.load(kimi_data)
    rope = Rope(config)
    assert rope.inv_freq.shape == (32,)
    for pair, expected in K26_FREQUENCIES.items():
        assert rope.inv_freq[pair].item() == pytest.approx(expected, rel=2e-6)
    assert rope.scale == 1.0
    assert config.softmax_scale == pytest.approx(0.144679626, rel=1e-8)


@pytest.mark.parametrize("size", [2, 6, 10, 64])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        ROPE_SCALING,
        ROPE_SCALING | {"factor": 8.0, "beta_fast": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
        ROPE_SCALING | {"factor": 1.0},
    ],
)
def test_rotation_equals_complex_multiplication(size: int, scaling: dict[str, float] | None) -> None:
    config = make_config(qk_rope_head_dim=size, rope_scaling=scaling)
    source = torch.Generator().manual_seed(size)
    positions = torch.randint(0, 10_000, (17,), generator=source)
    positions[0] = 0
    x = torch.randn(17, 3, size, generator=source)
    got = Rope(config).rotation(positions).apply(x)
    expected = mla.rotate(x.double(), positions, config)
    assert got.dtype == torch.float32
    # The angle is a product of fp32 numbers: its error is a few roundings of its own size; the turn moves as far.
    angle_error = 8 * EPS * positions[:, None, None] * Rope(config).inv_freq.max() + 8 * EPS
    length = x.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1) * mla.rope_multiplier(config)
    assert ((got - expected).abs() <= angle_error * length).all()


def test_neighbours_in_a_pair_turn_together() -> None:
    rope = Rope(make_config(qk_rope_head_dim=4, rope_scaling=None, rope_theta=10_000.0))
    turned = rope.rotation(torch.tensor([1])).apply(torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    expected = [math.cos(1), math.sin(1), math.cos(0.01), math.sin(0.01)]
    assert turned[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_scores_depend_on_the_distance_only() -> None:
    rope = Rope(make_config(qk_rope_head_dim=16))
    source = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 16, generator=source)
    scores = [
        (rope.rotation(torch.tensor([m + 77])).apply(q) * rope.rotation(torch.tensor([m])).apply(k)).sum().item()
        for m in (0, 5, 1000, 4000)
    ]
    bound = 4077 * 16 * EPS * q.norm().item() * k.norm().item()
    assert scores == pytest.approx([scores[0]] * 4, abs=bound)
    other = (rope.rotation(torch.tensor([78])).apply(q) * k).sum().item()
    assert abs(other - scores[0]) > bound


def test_equal_betas_make_a_step() -> None:
    config = make_config(qk_rope_head_dim=64, rope_scaling=ROPE_SCALING | {"beta_fast": 1.0})
    assert config.rope_scaling is not None
    plain = inverse_frequencies(64, config.rope_theta, None)
    ratio = plain / inverse_frequencies(64, config.rope_theta, config.rope_scaling)
    # All rotations that count as one lie between pairs 19 and 20: nothing lies between kept and divided.
    assert ratio.tolist() == pytest.approx([1.0] * 20 + [64.0] * 12, rel=1e-6)

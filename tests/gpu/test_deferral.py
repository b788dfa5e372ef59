"""Deferred experts through a GPU's hand-off; on a host in the place of a card where there is none."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from hybrid_k2.accelerator.handoff_cuda import CudaHandoff
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import parse_rules
from tests.generators import write_checkpoint
from tests.gpu.host_card import use_host_card
from tests.gpu.test_model_on_card import RULES, SIZES, on_host, random_steps, run
from tests.models import loaded
from tests.unit.test_deferral import forward

pytestmark = pytest.mark.skipif(NATIVE_ERROR is not None, reason="the native extension is not installed")


def test_they_act_one_layer_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the layers written out on the host, in fp32 as there; see test_model_on_card for the tolerance."""
    folder = write_checkpoint(tmp_path / "card", seed=13, **SIZES)
    with loaded(folder, on_host(parse_rules(RULES))) as host:
        steps = random_steps(host.config.vocab_size)
        usual = run(host, steps)
        host.model.forward = partial(forward, host.model, 2)  # type: ignore[method-assign]
        expected = run(host, steps)
    use_host_card(monkeypatch)
    with loaded(folder, parse_rules(f"{RULES}overlap: {{deferred: 2}}\n")) as card:
        assert isinstance(card.model.handoff, CudaHandoff)
        found = run(card, steps)
    error = (found - expected).abs().max()
    assert error < 1e-3 * expected.abs().max()
    assert (usual - expected).abs().max() > 10 * error

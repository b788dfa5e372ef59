"""Hot experts on a GPU: the sums of those that are there, before and after exchanges, and a model that has some."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybrid_k2.accelerator.hot_cuda import DECODE_TOKENS, CudaHotExperts, HotMemory
from hybrid_k2.accelerator.kernels import have_triton
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import HardwareError
from hybrid_k2.experts.base import ELSEWHERE, ExpertsShape
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.model.moe import Moe
from hybrid_k2.placement import Gpu, Machine, parse_rules
from tests.generators import write_checkpoint
from tests.gpu.host_card import use_host_card
from tests.gpu.test_int4_experts import EXACT_ERROR, ROUNDED_ERROR
from tests.models import loaded
from tests.unit.experts_common import float64_layer, load_random_experts, native_layer, random_routing

HIDDEN, INNER, EXPERTS, TOP_K = 64, 96, 7, 3
ERROR = {1: EXACT_ERROR, DECODE_TOKENS + 1: ROUNDED_ERROR}  # of an expert's output, by tokens


def check(hot: CudaHotExperts, whole: NativeExperts, oracle: object, device: torch.device, tokens: int) -> None:
    x, (ids, weights) = torch.randn(tokens, HIDDEN).bfloat16(), random_routing(tokens, EXPERTS, TOP_K)
    chosen = torch.isin(ids, torch.tensor(sorted(hot.experts), dtype=torch.int32))
    assert torch.equal(hot.elsewhere(ids.to(device)).cpu(), torch.where(chosen, ELSEWHERE, ids))
    got = hot.forward(x.to(device), ids.to(device), weights.to(device)).cpu()
    expected = oracle.forward(x, ids, torch.where(chosen, weights, 0.0))  # type: ignore[attr-defined]
    one = torch.eye(TOP_K, dtype=torch.bool)
    size = sum(
        oracle.forward(x, ids, torch.where(chosen & one[k], weights, 0.0)).norm(dim=1)  # type: ignore[attr-defined]
        for k in range(TOP_K)
    )
    assert ((got - expected).norm(dim=1) <= ERROR[tokens] * size + 1e-12).all()
    assert not got[~chosen.any(1)].any()


def test_layers_share_the_memory_and_exchange_experts(device: torch.device) -> None:
    shape = ExpertsShape(HIDDEN, INNER, EXPERTS, TOP_K)
    layers = [native_layer(HIDDEN, INNER, EXPERTS, TOP_K) for _ in range(2)]
    oracles = [float64_layer(HIDDEN, INNER, EXPERTS, TOP_K) for _ in range(2)]
    memory, hot = HotMemory(shape, 5, device), []
    for layer, oracle, held in zip(layers, oracles, ([1, 4, 6], [0, 5]), strict=True):
        load_random_experts(layer, oracle)
        hot.append(CudaHotExperts(memory, {expert: layer.copy_expert(expert) for expert in held}, device))
    for index, leaves, comes in ((0, 4, 0), (1, 0, 3), (0, 1, 4), (1, 5, 0)):
        for i in range(2):
            for tokens in ERROR:
                check(hot[i], layers[i], oracles[i], device, tokens)
        layers[index].check_copy(leaves, hot[index].copy(leaves))
        hot[index].bring(comes, layers[index].copy_expert(comes))
        check(hot[index], layers[index], oracles[index], device, 1)
        hot[index].exchange(leaves, comes)
        layers[index].check_copy(comes, hot[index].copy(comes))
    assert [hot[i].experts for i in range(2)] == [{0, 4, 6}, {0, 3}]


RULES = """\
version: 1
devices: {gpu: cuda:0}
place:
  - {what: embedding, on: host}
  - {what: attention, on: gpu, dtype: fp32}
  - {what: router, on: gpu, dtype: fp32}
  - {what: dense_mlp, on: gpu, dtype: fp32}
  - {what: shared_experts, on: gpu, dtype: fp32}
  - {what: routed_experts, on: host}
HOT  - {what: lm_head, on: gpu, dtype: fp32}
kv_cache: {dtype: fp32, tokens: 256}
overlap: off
"""
SIZES = {"q_lora_rank": 64, "num_hidden_layers": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny", seed=9, **SIZES)


def test_a_model_with_hot_experts_says_what_it_says_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens at a time, which are computed exactly; the experts that the counts ask for come in between."""
    use_host_card(monkeypatch)
    chance = torch.randint(0, ModelConfig.load(folder).vocab_size, (2,))
    ids = chance[torch.randint(0, 2, (60,))].tolist()
    found = []
    for rule in ("", "  - {what: routed_experts, on: gpu, hottest: 3}\n"):
        with loaded(folder, parse_rules(RULES.replace("HOT", rule))) as model:
            moe = model.model.layers[1].mlp
            assert isinstance(moe, Moe)
            before = None
            if model.model.hot is not None:
                assert isinstance(moe.hot, CudaHotExperts)
                before = moe.hot.experts
                model.model.hot._look_tokens = model.model.hot._until_look = 1
            found.append(model.logits(ids, [6] * 9).cpu())
            assert before is None or (moe.hot is not None and moe.hot.experts != before)
    assert found[0].std() > 0.1
    assert (found[1] - found[0]).abs().max() < 2e-3 * found[0].abs().max()


@pytest.mark.skipif(not have_triton(), reason="its absence is made up, but its kernels' file names it")
def test_without_triton_the_error_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_k2.accelerator.gpu_matrix.have_triton", lambda: False)
    monkeypatch.setattr(Machine, "probe", lambda: Machine(1 << 34, 1 << 34, 1, (Gpu(0, "Test GPU", 8 << 30),)))
    rules = parse_rules(RULES.replace("HOT", "  - {what: routed_experts, on: gpu, hottest: 3}\n"))
    with pytest.raises(HardwareError, match=r"hottest on cuda:0: expected triton") as caught, loaded(folder, rules):
        pass
    assert "hybrid-k2[gpu]" in (caught.value.hint or "")

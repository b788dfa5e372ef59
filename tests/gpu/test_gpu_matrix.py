"""Dense matrices in int8 and fp8 as the loader makes them, and a model whose dense groups all are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hybrid_k2.accelerator import gpu_matrix
from hybrid_k2.accelerator.gpu_matrix import DECODE_ROWS, GpuMatrix
from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.config import ModelConfig
from hybrid_k2.dense import quantize_int8
from hybrid_k2.errors import CheckpointError, HardwareError
from hybrid_k2.model.dense_loading import PIECE_BYTES, load_gpu_matrix
from hybrid_k2.placement import Gpu, Machine, Placement, parse_rules
from tests.generators import read_tensors, write_checkpoint, write_tensors
from tests.gpu.host_card import use_host_card
from tests.models import loaded

GATE = "language_model.model.layers.0.mlp.gate_proj"
TINY = {
    "q_lora_rank": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "vocab_size": 512,
    "num_hidden_layers": 2,
}


def test_a_matrix_is_made_of_pieces(device: torch.device) -> None:
    plain = torch.randn(96, 64)
    for dtype, bits in (("int8", 8 + 16 / 32), ("fp8", 8 + 32 / 64)):
        matrix = GpuMatrix(96, 64, dtype, device)
        for first, last in ((64, 96), (0, 64)):
            matrix.load_rows(first, plain[first:last])
        assert (matrix.shape, matrix.device.type) == ((96, 64), device.type)
        assert matrix.nbytes == 96 * 64 * bits / 8
        error = (matrix.weight.dequantize().cpu() - plain).norm() / plain.norm()
        assert error < (0.008 if dtype == "int8" else 0.03)
    whole = GpuMatrix(96, 64, "int8", device)
    whole.load_rows(0, plain)
    assert torch.equal(whole.weight.dequantize().cpu(), quantize_int8(plain).dequantize()), "the host's numbers"


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, DECODE_ROWS, DECODE_ROWS + 1])
def test_few_rows_are_exact_and_many_nearly(device: torch.device, dtype: str, tokens: int) -> None:
    matrix = GpuMatrix(64, 96, dtype, device)
    matrix.load_rows(0, torch.randn(64, 96))
    x = torch.randn(tokens, 96)
    plain = matrix.weight.dequantize().cpu().double()
    expected, magnitude = x.double() @ plain.T, x.double().abs() @ plain.abs().T
    rounding = 2**-9 if tokens > DECODE_ROWS and dtype == "int8" else 0  # of each weight to bf16
    result = matrix(x).cpu()
    assert result.dtype == torch.float32
    assert ((result.double() - expected).abs() <= magnitude * (2**-16 + rounding)).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny", seed=7, **TINY)


def test_loading_counts_bytes_and_leaves_other_tensors_plain(device: torch.device, folder: Path) -> None:
    read: list[int] = []
    with Checkpoint.open(folder) as checkpoint:
        on = Placement("cuda:0", "int8")
        matrix = load_gpu_matrix(checkpoint, GATE, on, device, read.append)
        assert matrix is not None
        plain = checkpoint.read_linear(GATE)
        assert sum(read) == plain.nbytes < PIECE_BYTES
        assert torch.equal(matrix.weight.dequantize().cpu(), quantize_int8(plain).dequantize())
        for other in (Placement("cuda:0", "bf16"), Placement("host", "int8"), Placement("twin", "int8")):
            assert load_gpu_matrix(checkpoint, GATE, other, device, read.append) is None
    odd = write_checkpoint(folder.parent / "odd", **TINY | {"intermediate_size": 72})
    with Checkpoint.open(odd) as checkpoint:
        assert load_gpu_matrix(checkpoint, GATE, Placement("cuda:0", "int8"), device, read.append) is None


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_values_that_cannot_be_quantised_are_named(device: torch.device, folder: Path, dtype: str) -> None:
    tensors = read_tensors(folder)
    tensors[f"{GATE}.weight"][3, 5] = torch.inf
    write_tensors(folder, tensors)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError) as caught:
        load_gpu_matrix(checkpoint, GATE, Placement("cuda:0", dtype), device, lambda nbytes: None)
    assert re.fullmatch(
        rf"{re.escape(GATE)}\.weight: expected finite .* \(in model.safetensors\)", caught.value.message
    )


def test_without_triton_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_matrix, "have_triton", lambda: False)
    with pytest.raises(HardwareError, match=r"int8 on cpu: expected triton") as caught:
        GpuMatrix(32, 32, "int8", torch.device("cpu"))
    assert "hybrid-k2[gpu]" in (caught.value.hint or "")


def test_without_triton_nothing_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_matrix, "have_triton", lambda: False)
    monkeypatch.setattr(Machine, "probe", lambda: Machine(1 << 34, 1 << 34, 1, (Gpu(0, "Test GPU", 8 << 30),)))
    monkeypatch.setattr(Checkpoint, "read_linear", lambda *_: pytest.fail("a weight was read"))
    with (
        pytest.raises(HardwareError, match=r"int8 on cuda:0: expected triton"),
        loaded(folder, parse_rules(RULES % (("gpu",) * 5))),
    ):
        pass


RULES = """\
version: 1
devices: {gpu: cuda:0}
place:
  - {what: embedding, on: host}
  - {what: attention, on: %s, dtype: int8}
  - {what: router, on: %s, dtype: fp32}
  - {what: dense_mlp, on: %s, dtype: fp32}
  - {what: shared_experts, on: %s, dtype: int8}
  - {what: routed_experts, on: host}
  - {what: lm_head, on: %s, dtype: int8}
kv_cache: {dtype: fp32, tokens: 64}
overlap: off
"""


def test_a_model_with_int8_on_the_gpu_says_what_it_says_on_the_host(
    device: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both hold the same numbers, and fp32 activations leave rounding of the sums alone."""
    use_host_card(monkeypatch)
    ids = torch.randint(0, ModelConfig.load(folder).vocab_size, (4,)).tolist()
    rules = {where: parse_rules(RULES % ((where,) * 5)) for where in ("host", "gpu")}
    with loaded(folder, rules["gpu"]) as on_gpu:
        assert on_gpu.plan.where("attention", 0).device == "cuda:0"
        layer = on_gpu.model.layers[1]
        assert isinstance(layer.attention.q_a, GpuMatrix)
        found = on_gpu.logits(ids, [3]).cpu()
    with loaded(folder, rules["host"]) as on_host:
        expected = on_host.logits(ids, [3])
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()

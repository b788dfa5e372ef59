from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
import threading
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hybrid_k2.accelerator import DirectHandoff, SubmitHandoff
from hybrid_k2.checkpoint import Checkpoint, expected_tensors
from hybrid_k2.config import ModelConfig
from hybrid_k2.dense import HostMatrix, Int8Weight, fits_blocks, quantize_int8
from hybrid_k2.errors import CheckpointError, MemoryBudgetError
from hybrid_k2.experts.open import open_experts
from hybrid_k2.model import dense_loading, loader
from hybrid_k2.model.dense_loading import PIECE_BYTES
from hybrid_k2.model.devices import torch_dtype
from hybrid_k2.model.layers import SwiGlu
from hybrid_k2.model.loader import load_text_model
from hybrid_k2.model.moe import Moe
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import parse_rules
from tests.generators import read_tensors, write_checkpoint, write_tensors
from tests.models import loaded, make_test_plan

MIXED_RULES = """
version: 1
devices: {host: {memory: auto, threads: 1}}
place:
  - {what: embedding, on: host, dtype: bf16}
  - {what: attention, layers: 0..1, on: host, dtype: fp32}
  - {what: attention, layers: 2, on: host, dtype: bf16}
  - {what: router, on: host, dtype: bf16}
  - {what: dense_mlp, on: host, dtype: fp32}
  - {what: shared_experts, layers: 1, on: host, dtype: bf16}
  - {what: shared_experts, layers: 2, on: host, dtype: fp32}
  - {what: routed_experts, on: host}
  - {what: lm_head, on: host, dtype: fp32}
kv_cache: {on: host, dtype: bf16, tokens: 4096}
numerics: reference
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), seed=1, shards=3)


def dtypes_of(model_part: object) -> set[torch.dtype]:
    tensors = [value for value in vars(model_part).values() if isinstance(value, torch.Tensor)]
    return {tensor.dtype for tensor in tensors}


def test_each_group_gets_the_dtype_of_the_plan(folder: Path) -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    with loaded(folder, parse_rules(MIXED_RULES, "mixed.yaml")) as mixed:
        model = mixed.model
        first, second, third = model.layers
        assert (model.embedding.dtype, model.lm_head.dtype, model.final_norm.weight.dtype) == (bf16, fp32, fp32)
        for layer, dtype in ((first, fp32), (second, fp32), (third, bf16)):
            norms = (layer.input_norm, layer.attention.q_a_norm, layer.attention.kv_a_norm)
            assert dtypes_of(layer.attention) == {dtype}
            assert {norm.weight.dtype for norm in norms} == {dtype}
        assert isinstance(first.mlp, SwiGlu)
        assert dtypes_of(first.mlp) == {first.post_norm.weight.dtype} == {fp32}
        for layer, dtype in ((second, bf16), (third, fp32)):
            assert isinstance(layer.mlp, Moe)
            assert dtypes_of(layer.mlp.shared) == {dtype}
            assert layer.mlp.router.weight.dtype == layer.post_norm.weight.dtype == bf16
            assert layer.mlp.router.bias.dtype == fp32
        assert mixed.cache().layers[0].dtype == bf16
        logits = mixed.logits(list(range(40)), [25])
    with loaded(folder) as reference:
        expected = reference.logits(list(range(40)))
    error = (logits - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0 < error.median() < 0.04  # a few roundings to bf16


@pytest.mark.parametrize(("overlap", "handoff"), [("off", DirectHandoff), ("ping_pong", SubmitHandoff)])
def test_experts_start_at_once_where_two_halves_take_turns(folder: Path, overlap: str, handoff: type) -> None:
    """Also where the shared expert is on the host: with attention on a GPU, the other half's is beside the experts."""
    with loaded(folder, "host", overlap=overlap) as model:
        assert type(model.model.handoff) is handoff
        assert model.model.ping_pong == (overlap == "ping_pong")


def test_loads_the_values_of_the_checkpoint(folder: Path) -> None:
    tensors = read_tensors(folder)
    prefix = "language_model.model.layers"
    with loaded(folder) as reference:
        layer = reference.model.layers[2]
        assert isinstance(layer.mlp, Moe)
        pairs = {
            f"{prefix}.2.self_attn.kv_a_proj_with_mqa.weight": layer.attention.kv_a,
            f"{prefix}.2.post_attention_layernorm.weight": layer.post_norm.weight,
            f"{prefix}.2.mlp.shared_experts.up_proj.weight": layer.mlp.shared.up,
            f"{prefix}.2.mlp.gate.e_score_correction_bias": layer.mlp.router.bias,
            "language_model.lm_head.weight": reference.model.lm_head,
        }
        for name, tensor in pairs.items():
            assert torch.equal(tensor, tensors[name].float()), name


INT8_RULES = """
version: 1
devices: {host: {memory: auto, threads: 1}}
place:
  - {what: embedding, on: host}
  - {what: attention, on: host, dtype: int8}
  - {what: dense_mlp, on: host, dtype: int8}
  - {what: shared_experts, on: host, dtype: int8}
  - {what: routed_experts, on: host}
  - {what: lm_head, on: host, dtype: int8}
kv_cache: {dtype: fp32}
"""
# Whole blocks of 32 for most matrices; o [96, 24] stays bf16.
BLOCKS = {"hidden_size": 96, "q_lora_rank": 64, "kv_lora_rank": 56, "v_head_dim": 6}


@pytest.fixture(scope="module")
def block_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("blocks"), seed=5, **BLOCKS)


def quantised_copy(folder: Path, target: Path) -> Path:
    """Write the checkpoint with the values that int8 keeps, in fp32 where bf16 would round them again."""
    tensors = read_tensors(folder)
    parts = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    for name, tensor in tensors.items():
        if name.endswith(tuple(f"{part}.weight" for part in parts)) and fits_blocks(*tensor.shape):
            tensors[name] = quantize_int8(tensor).dequantize()
    shutil.copytree(folder, target)
    write_tensors(target, tensors)
    return target


def test_int8_loads_what_quantising_gives(block_folder: Path) -> None:
    tensors, prefix = read_tensors(block_folder), "language_model.model.layers"
    with loaded(block_folder, parse_rules(INT8_RULES, "int8.yaml")) as int8:
        first, second = int8.model.layers[:2]
        assert isinstance(second.mlp, Moe)
        pairs = {
            f"{prefix}.0.self_attn.q_a_proj": first.attention.q_a,
            f"{prefix}.0.mlp.down_proj": first.mlp.down,  # type: ignore[union-attr]
            f"{prefix}.1.mlp.shared_experts.up_proj": second.mlp.shared.up,
            "language_model.lm_head": int8.model.lm_head,
        }
        for name, matrix in pairs.items():
            expected = quantize_int8(tensors[f"{name}.weight"])
            got = matrix.read() if isinstance(matrix, HostMatrix) else matrix
            assert isinstance(got, Int8Weight), name
            assert torch.equal(got.values, expected.values), name
            assert torch.equal(got.scale, expected.scale), name
        kept = {
            f"{prefix}.0.self_attn.kv_b_proj": first.attention.kv_b,
            f"{prefix}.0.input_layernorm": first.input_norm.weight,
        }
        for name, tensor in kept.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, tensors[f"{name}.weight"]), name


@pytest.mark.parametrize("native", [True, False])
def test_int8_computes_with_the_quantised_weights(native: bool, block_folder: Path, tmp_path: Path) -> None:
    ids = list(range(60))
    if native and NATIVE_ERROR is not None:
        pytest.skip(f"the native extension is not installed: {NATIVE_ERROR}")
    rules = parse_rules(INT8_RULES + ("" if native else "numerics: reference\n"), "int8.yaml")
    with loaded(block_folder, rules) as int8:
        assert isinstance(int8.model.lm_head, HostMatrix if native else Int8Weight)
        got = int8.logits(ids, [25, 1])
    with loaded(block_folder) as plain, loaded(quantised_copy(block_folder, tmp_path / "copy")) as reference:
        before, expected = plain.logits(ids), reference.logits(ids)
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    cost = (expected - before).norm(dim=1) / before.norm(dim=1)
    assert error.median() < (1e-3 if native else 1e-5)
    assert 2e-3 < cost.median() < 4e-2  # what quantising itself costs, three layers deep


def test_bf16_on_the_host_is_computed_by_the_native_kernels(block_folder: Path) -> None:
    if NATIVE_ERROR is not None:
        pytest.skip(f"the native extension is not installed: {NATIVE_ERROR}")
    ids = list(range(60))
    with loaded(block_folder, "host", activation_dtype="fp32") as host, loaded(block_folder) as reference:
        attention = host.model.layers[2].attention
        assert isinstance(attention.q_a, HostMatrix)
        assert isinstance(attention.o, torch.Tensor)  # 24 inputs: not whole blocks
        assert torch.equal(attention.q_a.read().float(), reference.model.layers[2].attention.q_a)
        assert host.plan.kv_cache.dtype == "bf16"
        got, expected = host.logits(ids, [25, 1]), reference.logits(ids)
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 1e-2  # of the latents, rounded to bf16 in the cache


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_the_router_is_kept_as_the_plan_shows_it(dtype: str | None, block_folder: Path) -> None:
    if NATIVE_ERROR is not None:
        pytest.skip(f"the native extension is not installed: {NATIVE_ERROR}")
    rule = "" if dtype is None else f"  - {{what: router, on: host, dtype: {dtype}}}\n"
    rules = parse_rules(INT8_RULES.replace("kv_cache", f"{rule}kv_cache"), "router.yaml")
    with loaded(block_folder, rules) as model, loaded(block_folder) as reference:
        mlp, expected = model.model.layers[2].mlp, reference.model.layers[2].mlp
        assert isinstance(mlp, Moe)
        assert isinstance(expected, Moe)
        planned, weight = model.plan.where("router", 2).dtype, mlp.router.weight
        kept = weight.read() if isinstance(weight, HostMatrix) else weight
        assert isinstance(kept, torch.Tensor)
        assert torch_dtype(planned) == kept.dtype == model.model.layers[2].post_norm.weight.dtype
        assert isinstance(weight, HostMatrix) == (planned == "bf16")
        assert torch.equal(kept.float()[: len(mlp.router.bias)], expected.router.weight)


def test_a_weight_that_int8_cannot_hold_is_named(block_folder: Path, tmp_path: Path) -> None:
    tensors = read_tensors(block_folder)
    name = "language_model.model.layers.1.mlp.shared_experts.up_proj.weight"
    tensors[name][3, 40] = float("inf")
    write_tensors(tmp_path, tensors)
    config = ModelConfig.load(block_folder)
    with Checkpoint.open(tmp_path) as checkpoint:
        plan = make_test_plan(checkpoint, config, parse_rules(INT8_RULES, "int8.yaml"))
        file = checkpoint.info(name).file.name
        place = re.escape(f"got inf at row 3, input 40 (in {file})")
        with pytest.raises(CheckpointError, match=f"^{re.escape(name)}: expected finite values below .*, {place}$"):
            load_text_model(checkpoint, config, plan)


@pytest.mark.parametrize("what", ["gate", "q_a_proj", "lm_head"])
def test_a_matrix_that_has_no_room_is_named(what: str, block_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if NATIVE_ERROR is not None:
        pytest.skip(f"the native extension is not installed: {NATIVE_ERROR}")
    config = ModelConfig.load(block_folder)
    rows = {"gate": -(-config.n_routed_experts // 32) * 32, "q_a_proj": 64, "lm_head": config.vocab_size}[what]

    def allocate(runtime: object, count: int, inputs: int, dtype: str) -> HostMatrix:
        if count == rows:
            raise MemoryError("memory: expected 5 bytes")
        return HostMatrix(runtime, count, inputs, dtype)

    monkeypatch.setattr(dense_loading, "HostMatrix", allocate)
    with Checkpoint.open(block_folder) as checkpoint:
        plan = make_test_plan(checkpoint, config, parse_rules(INT8_RULES, "int8.yaml"))
        with pytest.raises(
            MemoryBudgetError, match=rf"\b{what}: expected room in host memory, got none left"
        ) as caught:
            load_text_model(checkpoint, config, plan)
    assert "taken since" in (caught.value.hint or "")


def test_progress_counts_the_bytes_that_are_read(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    config = ModelConfig.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        specs = [spec for spec in expected_tensors(config, checkpoint.has) if spec.what != "vision"]
        needed = sum(checkpoint.info(spec.name).nbytes for spec in specs)
        plan = make_test_plan(checkpoint, config, "host")
        load_text_model(checkpoint, config, plan, lambda done, total: calls.append((done, total))).close()
    done = [done for done, _ in calls]
    assert {total for _, total in calls} == {needed}
    assert needed < checkpoint.total_bytes  # the vision tower is read by a loader of its own
    assert all(b > a for a, b in pairwise(done))
    assert done[-1] == needed
    assert max(b - a for a, b in pairwise([0, *done])) < needed / 5


@pytest.mark.parametrize("rules", ["reference", "host"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [0.0, 0.5, 1.0])
def test_releases_everything_when_stopped(
    folder: Path, rules: str, stop: type[BaseException], after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def progress(done: int, total: int) -> None:
        if done >= after * total:
            raise stop

    runtimes: list[weakref.ref[object]] = []

    def open_and_watch(*args, **kwargs):  # type: ignore[no-untyped-def]
        runtime = open_experts(*args, **kwargs)
        runtimes.append(weakref.ref(runtime))
        return runtime

    monkeypatch.setattr(loader, "open_experts", open_and_watch)
    threads = set(threading.enumerate())
    config = ModelConfig.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        plan = make_test_plan(checkpoint, config, rules)
        with pytest.raises(stop):
            load_text_model(checkpoint, config, plan, progress)
    gc.collect()
    assert [runtime() for runtime in runtimes] == [None]
    assert set(threading.enumerate()) <= threads
    with loaded(folder, rules) as model:  # and the next attempt works
        assert model.logits([1, 2, 3]).isfinite().all()


def test_checks_before_it_reads(folder: Path, tmp_path: Path) -> None:
    tensors = read_tensors(folder)
    last = "language_model.model.layers.2.mlp.experts.15.down_proj.weight_scale"
    tensors[last] = tensors[last].float()
    write_tensors(tmp_path, tensors)
    config = ModelConfig.load(folder)
    calls: list[int] = []
    with Checkpoint.open(tmp_path) as checkpoint:
        plan = make_test_plan(checkpoint, config, "host")
        with pytest.raises(
            CheckpointError, match=r"experts\.15\.down_proj\.weight_scale.*BF16.*F32.*model\.safetensors"
        ):
            load_text_model(checkpoint, config, plan, lambda done, _: calls.append(done))
    assert calls == []


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.layers.1.mlp.experts.7.up_proj.weight_packed"])
@pytest.mark.parametrize("rules", ["host", "reference"])
def test_a_file_that_shrinks_while_loading_is_named(tensor: str, rules: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, seed=2, model_type="kimi_k2")
    config = ModelConfig.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        plan = make_test_plan(checkpoint, config, rules)
        info = checkpoint.info(tensor)
        with open(info.file, "r+b") as file:
            file.truncate(info.offset + 1)
        with pytest.raises(
            CheckpointError, match=r"(expected \d+ bytes, got \d+|got \d+ bytes instead).*model\.safetensors"
        ):
            load_text_model(checkpoint, config, plan)


@pytest.mark.parametrize(("scale", "said"), [(float("inf"), "infinity"), (float("nan"), "NaN"), (256.0, "256")])
def test_a_scale_that_the_kernels_cannot_use_is_placed(folder: Path, scale: float, said: str, tmp_path: Path) -> None:
    if NATIVE_ERROR is not None:
        pytest.skip(f"the native extension is not installed: {NATIVE_ERROR}")
    tensors = read_tensors(folder)
    expert = "language_model.model.layers.1.mlp.experts.9"
    tensors[f"{expert}.up_proj.weight_scale"][3, 1] = scale
    write_tensors(tmp_path, tensors)
    config = ModelConfig.load(folder)
    with Checkpoint.open(tmp_path) as checkpoint:
        plan = make_test_plan(checkpoint, config, "host")
        with pytest.raises(
            CheckpointError, match=rf"{re.escape(expert)}.*up.*scale of row 3, group 1: .*, got {said} \(in"
        ):
            load_text_model(checkpoint, config, plan)


PEAK_SCRIPT = """
import re, sys
from pathlib import Path
from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.config import ModelConfig
from hybrid_k2.experts import open_experts
from hybrid_k2.model.loader import load_text_model
from tests.models import make_test_plan

open_experts("exact", 1).close()  # the backend's own code (numba, where there is no extension) is not the loader's

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder, rules = Path(sys.argv[1]), sys.argv[2]
config = ModelConfig.load(folder)
with Checkpoint.open(folder) as checkpoint:
    plan = make_test_plan(checkpoint, config, rules)
    largest = max(info.nbytes for info in checkpoint.infos.values())
    weights = sum(row.nbytes for row in plan.rows if row.what != "vision")
    before = memory("VmRSS")
    model = load_text_model(checkpoint, config, plan)
print(memory("VmHWM") - before, weights, largest)
"""


@pytest.fixture(scope="module")
def larger_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("larger")
    return write_checkpoint(folder, vocab_size=8192, hidden_size=2048, n_routed_experts=4, num_hidden_layers=2)


@pytest.mark.parametrize("rules", ["host", "reference"])
def test_memory_peaks_at_the_plan_and_one_tensor(rules: str, larger_folder: Path) -> None:
    """A tensor that is being converted exists twice; of one that the native kernels compute, only a piece does."""
    command = [sys.executable, "-c", PEAK_SCRIPT, str(larger_folder), rules]
    repo = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=repo)
    assert result.returncode == 0, result.stderr
    peak, weights, largest = map(int, result.stdout.split())
    slack = 16 << 20  # code and threads that loading brings in
    assert weights > 4 * slack
    assert largest > 1.5 * PIECE_BYTES
    assert 0.9 * weights < peak < weights + (PIECE_BYTES if rules == "host" else largest) + slack

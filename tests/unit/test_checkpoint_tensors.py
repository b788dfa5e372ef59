"""Which tensors the model needs: names and shapes, the check, and reading experts."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_k2.checkpoint import (
    Checkpoint,
    PackedWeight,
    check_checkpoint,
    expected_tensors,
    experts_packed,
    pack_int4,
    read_expert,
    vision_tensors,
)
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import CheckpointError
from tests.conftest import SHARED
from tests.generators import config_dict, dequantized, read_tensors, write_checkpoint, write_tensors

ODD: dict[str, Any] = {
    "num_hidden_layers": 5,
    "n_routed_experts": 24,
    "num_experts_per_tok": 6,
    "hidden_size": 160,
    "moe_intermediate_size": 96,
    "num_attention_heads": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "plain": {"packed": False},
    "text only": {"model_type": "kimi_k2"},
    "odd": ODD,
    "two dense layers, two shared experts": {"first_k_dense_replace": 2, "n_shared_experts": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "no mixture": {"first_k_dense_replace": 3},
    "float32 in three shards": {"dtype": torch.float32, "shards": 3},
}
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
LAYER = "language_model.model.layers"


@pytest.mark.parametrize("kind", KINDS)
def test_expected_is_what_an_independent_writer_writes(kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, seed=1, **KINDS[kind])
    config = ModelConfig.load(tmp_path)
    written = read_tensors(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        specs = list(expected_tensors(config, checkpoint.has))
        check_checkpoint(checkpoint, config)
        packed = experts_packed(checkpoint, config)
    assert {spec.name: spec.shape for spec in specs} == {name: tuple(t.shape) for name, t in written.items()}
    assert len(specs) == len(written)
    assert all(NAMES[written[spec.name].dtype] in spec.dtypes for spec in specs)
    assert packed == (kind not in ("plain", "no mixture"))


def test_groups_and_layers(tmp_path: Path) -> None:
    config = ModelConfig.load(write_checkpoint(tmp_path, num_hidden_layers=2))
    with Checkpoint.open(tmp_path) as checkpoint:
        groups = {spec.name.removeprefix("language_model."): spec for spec in expected_tensors(config, checkpoint.has)}
    rules = {
        r"(vision_tower|mm_projector)\.": ("vision", None),
        r"model\.embed_tokens\.": ("embedding", None),
        r"(model\.norm|lm_head)\.": ("lm_head", None),
        r"model\.layers\.(\d)\.(input_layernorm|self_attn)\.": ("attention", int),
        r"model\.layers\.(0)\.(post_attention_layernorm|mlp)\.": ("dense_mlp", int),
        r"model\.layers\.(1)\.(post_attention_layernorm|mlp\.gate)\.": ("router", int),
        r"model\.layers\.(1)\.mlp\.shared_experts\.": ("shared_experts", int),
        r"model\.layers\.(1)\.mlp\.experts\.": ("routed_experts", int),
    }
    for name, spec in groups.items():
        match, (what, layer) = next((m, rule) for p, rule in rules.items() if (m := re.match(p, name)))
        assert (spec.what, spec.layer) == (what, layer and layer(match[1])), name


# The full size: only headers are written; the files are sparse.


def real_config() -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 163840,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    vision = {
        "vt_hidden_size": 1152,
        "mm_hidden_size": 1152,
        "vt_intermediate_size": 4304,
        "vt_num_hidden_layers": 27,
        "vt_num_attention_heads": 16,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
    }
    return ModelConfig.from_dict(config_dict(vision=vision, **sizes), "config.json")


def write_sparse(folder: Path, config: ModelConfig, shards: int) -> None:
    """Write the headers of a full checkpoint, each file as long as its header says and empty behind it."""
    item = {"BF16": 2, "I32": 4, "F32": 4}
    headers: list[dict[str, Any]] = [{} for _ in range(shards)]
    sizes = [0] * shards
    weight_map = {}
    for i, spec in enumerate(expected_tensors(config, lambda name: ".experts." in name and "packed" in name)):
        shard = i * shards // 210_000
        nbytes = item[spec.dtypes[0]]
        for size in spec.shape:
            nbytes *= size
        headers[shard][spec.name] = {
            "dtype": spec.dtypes[0],
            "shape": spec.shape,
            "data_offsets": [sizes[shard], sizes[shard] + nbytes],
        }
        sizes[shard] += nbytes
        weight_map[spec.name] = f"model-{shard + 1:05}-of-{shards:06}.safetensors"
    for shard, (header, size) in enumerate(zip(headers, sizes, strict=True)):
        text = json.dumps(header).encode()
        path = folder / f"model-{shard + 1:05}-of-{shards:06}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def vision_parameters() -> int:
    """Count the parameters of K2.6's vision tower and projector."""
    width, inner, merged, text = 1152, 4304, 4 * 1152, 7168

    def linear(out_features: int, in_features: int) -> int:
        return out_features * (in_features + 1)

    block = 4 * width + linear(3 * width, width) + linear(width, width) + linear(inner, width) + linear(width, inner)
    tower = linear(width, 3 * 14 * 14) + 64 * 64 * width + 27 * block + 2 * width
    return tower + 2 * width + linear(merged, merged) + linear(text, merged)


def test_full_size_opens_and_checks_in_seconds(tmp_path: Path) -> None:
    config = real_config()
    try:
        write_sparse(tmp_path, config, 64)
    except OSError as error:
        pytest.skip(f"no sparse files of this size here: {error}")
    start = time.process_time()  # not wall-clock time: other work may run beside the tests
    with Checkpoint.open(tmp_path) as checkpoint:
        check_checkpoint(checkpoint, config)
        seconds = time.process_time() - start
        assert experts_packed(checkpoint, config)
        # Published: 208,550 tensors of 595,148,192,736 bytes in all. Of these the router's 60 * 384 correction biases,
        # BF16 in this test, are FP32.
        assert len(checkpoint.infos) == 208_550
        assert checkpoint.total_bytes == 595_148_192_736 - 2 * 60 * 384
        vision = [spec.name for spec in vision_tensors(config)]
        assert len(vision) == 329 + 6
        assert sum(checkpoint.info(name).nbytes for name in vision) == 2 * vision_parameters()
        last = checkpoint.read(f"{LAYER}.60.mlp.experts.383.down_proj.weight_shape")
    assert last.tolist() == [0, 0]  # read from a hole of the file
    assert seconds < 60, f"opening and checking took {seconds:.1f} s; it is a few unless it is quadratic"


# One wrong tensor of any group is found and named.

ONE_OF_EACH = [
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
    f"{LAYER}.0.input_layernorm.weight",
    f"{LAYER}.2.post_attention_layernorm.weight",
    f"{LAYER}.1.self_attn.q_a_proj.weight",
    f"{LAYER}.1.self_attn.q_a_layernorm.weight",
    f"{LAYER}.0.self_attn.q_b_proj.weight",
    f"{LAYER}.2.self_attn.kv_a_proj_with_mqa.weight",
    f"{LAYER}.2.self_attn.kv_a_layernorm.weight",
    f"{LAYER}.1.self_attn.kv_b_proj.weight",
    f"{LAYER}.0.self_attn.o_proj.weight",
    f"{LAYER}.0.mlp.gate_proj.weight",
    f"{LAYER}.0.mlp.down_proj.weight",
    f"{LAYER}.1.mlp.gate.weight",
    f"{LAYER}.2.mlp.gate.e_score_correction_bias",
    f"{LAYER}.1.mlp.shared_experts.up_proj.weight",
    f"{LAYER}.2.mlp.experts.15.gate_proj.weight_packed",
    f"{LAYER}.1.mlp.experts.0.up_proj.weight_scale",
    f"{LAYER}.2.mlp.experts.7.down_proj.weight_shape",
    "vision_tower.patch_embed.proj.weight",
    "vision_tower.patch_embed.pos_emb.weight",
    "vision_tower.encoder.blocks.1.wqkv.bias",
    "vision_tower.encoder.blocks.0.mlp.fc1.weight",
    "vision_tower.encoder.final_layernorm.bias",
    "mm_projector.proj.2.weight",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, dict[str, Tensor]]:
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), seed=5)
    return ModelConfig.load(folder), read_tensors(folder)


def refusal(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], shards: int = 1) -> CheckpointError:
    write_tensors(folder, tensors, shards)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError) as error:
        check_checkpoint(checkpoint, config)
    return error.value


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_missing_tensor(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]], name: str) -> None:
    config, tensors = tiny
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    shape = re.escape(str(list(tensors[name].shape)))
    message = rf"^{re.escape(name)}: expected .* {shape}, got no such tensor \(in "
    assert re.search(message + r"model\.safetensors\)", refusal(tmp_path, config, rest).message)
    assert re.search(message + r"model\.safetensors\.index\.json\)", refusal(tmp_path, config, rest, shards=2).message)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_misshaped_tensor(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]], name: str) -> None:
    config, tensors = tiny
    shape = list(tensors[name].shape)
    longer = torch.zeros([*shape[:-1], shape[-1] + 4], dtype=tensors[name].dtype)
    error = refusal(tmp_path, config, tensors | {name: longer}, shards=3)
    with Checkpoint.open(tmp_path) as checkpoint:
        file = checkpoint.info(name).file.name
    assert error.message == f"{name}: expected shape {shape}, got {list(longer.shape)} (in {file})"


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_tensor_of_another_type(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]], name: str) -> None:
    config, tensors = tiny
    error = refusal(tmp_path, config, tensors | {name: tensors[name].to(torch.float64)})
    assert re.match(rf"{re.escape(name)}: expected dtype .*, got F64 \(in model\.safetensors\)$", error.message)


def test_the_message_in_full(tmp_path: Path) -> None:
    config = ModelConfig.load(write_checkpoint(tmp_path, model_type="kimi_k2", num_hidden_layers=4, shards=4))
    tensors = read_tensors(tmp_path)
    name = "model.layers.3.self_attn.q_a_proj.weight"
    tensors[name] = tensors[name][:, :60].contiguous()
    message = refusal(tmp_path, config, tensors, shards=4).message
    assert re.fullmatch(
        r"model\.layers\.3\.self_attn\.q_a_proj\.weight: expected shape \[48, 64\], got \[48, 60\] "
        r"\(in model-0000\d-of-00004\.safetensors\)",
        message,
    )


def test_the_config_of_another_size(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    larger = ModelConfig.from_dict(config_dict(num_hidden_layers=4), "config.json")
    assert ".layers.3.input_layernorm.weight: expected" in refusal(tmp_path, larger, tiny[1]).message
    more = ModelConfig.from_dict(config_dict(n_routed_experts=15), "config.json")
    assert "mlp.gate.weight: expected shape [15, 64], got [16, 64]" in refusal(tmp_path, more, tiny[1]).message


def test_a_file_without_tensors(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    message = refusal(tmp_path, tiny[0], {}).message
    assert re.match(r"language_model\.model\.embed_tokens\.weight: expected .* got no such tensor", message)


def test_unknown_tensors_are_left_alone(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    config, tensors = tiny
    extra = {
        f"{LAYER}.3.eh_proj.weight": torch.ones(2),  # a draft layer
        f"{LAYER}.2.more.weight": torch.ones(2),
        "vision_tower.model.layers.99.x": torch.ones(1, dtype=torch.int8),
    }
    write_tensors(tmp_path, tensors | extra)
    with Checkpoint.open(tmp_path) as checkpoint:
        check_checkpoint(checkpoint, replace(config, num_draft_layers=1))


@pytest.mark.parametrize("layer", [3, 41, 10**30])
@pytest.mark.parametrize("drafts", [0, 1])
def test_a_layer_too_many(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]], layer: int, drafts: int) -> None:
    config, tensors = tiny
    layer += drafts
    error = refusal(
        tmp_path,
        replace(config, num_draft_layers=drafts),
        tensors | {f"{LAYER}.{layer}.input_layernorm.weight": torch.ones(64)},
    )
    assert error.message.startswith(
        f"{LAYER}.{layer}.input_layernorm.weight: expected layers 0..{2 + drafts} only, got layer {layer} (in "
    )
    assert "num_hidden_layers" in (error.hint or "")


@pytest.mark.parametrize("block", [2, 30])
def test_a_block_of_the_vision_tower_too_many(
    tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]], block: int
) -> None:
    config, tensors = tiny
    name = f"vision_tower.encoder.blocks.{block}.norm0.weight"
    error = refusal(tmp_path, config, tensors | {name: torch.ones(48)})
    assert error.message.startswith(f"{name}: expected layers 0..1 only, got layer {block} (in ")
    assert "num_hidden_layers" in (error.hint or "")
    write_tensors(tmp_path, tensors | {name: torch.ones(48)})
    with Checkpoint.open(tmp_path) as checkpoint:
        check_checkpoint(checkpoint, replace(config, vision=None))


def test_a_vision_tower_that_is_not_there(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    config, tensors = tiny
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("language_model.")}
    error = refusal(tmp_path, config, text)
    assert error.message.startswith(
        "vision_tower.patch_embed.proj.weight: expected BF16 or F16 or F32 [48, 3, 14, 14], got"
    )
    assert "vision_config" in (error.hint or "")
    with Checkpoint.open(tmp_path) as checkpoint:
        check_checkpoint(checkpoint, replace(config, vision=None))


def test_a_model_cut_short_by_its_config(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    config, tensors = tiny
    message = refusal(tmp_path, replace(config, num_hidden_layers=2), tensors, shards=2).message
    assert re.match(rf"{re.escape(LAYER)}\.2\..*: expected layers 0\.\.1 only, got layer 2 \(in model-", message)


# Experts.


@pytest.mark.parametrize("kind", ["tiny", "odd", "text only"])
def test_read_packed_experts(kind: str, tmp_path: Path) -> None:
    config = ModelConfig.load(write_checkpoint(tmp_path, seed=8, **KINDS[kind]))
    tensors = read_tensors(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        for layer in config.moe_layers:
            for expert in (0, config.n_routed_experts // 2, config.n_routed_experts - 1):
                weights = read_expert(checkpoint, config, layer, expert)
                prefix = f"{config.tensor_prefix}model.layers.{layer}.mlp.experts.{expert}"
                for name in ("gate", "up", "down"):
                    weight = getattr(weights, name)
                    packed = tensors[f"{prefix}.{name}_proj.weight_packed"]
                    scale = tensors[f"{prefix}.{name}_proj.weight_scale"]
                    assert isinstance(weight, PackedWeight)
                    assert torch.equal(weight.packed, packed)
                    assert torch.equal(weight.scale, scale)
                    assert torch.equal(weight.dequantize(), dequantized(packed, scale))
                sizes = (config.hidden_size, config.moe_intermediate_size)
                assert (weights.down.shape, weights.up.shape) == (sizes, sizes[::-1])


def test_read_plain_experts(tmp_path: Path) -> None:
    config = ModelConfig.load(write_checkpoint(tmp_path, seed=9, packed=False, hidden_size=90))
    tensors = read_tensors(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        weights = read_expert(checkpoint, config, 2, 11)
    assert isinstance(weights.up, Tensor)
    assert torch.equal(weights.up, tensors[f"{LAYER}.2.mlp.experts.11.up_proj.weight"])


def test_weight_shape_is_compared_when_the_expert_is_read(
    tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]]
) -> None:
    config, tensors = tiny
    name = f"{LAYER}.1.mlp.experts.6.down_proj.weight_shape"
    write_tensors(tmp_path, tensors | {name: torch.tensor([64, 63], dtype=torch.int64)})
    with Checkpoint.open(tmp_path) as checkpoint:
        check_checkpoint(checkpoint, config)
        read_expert(checkpoint, config, 1, 5)
        with pytest.raises(CheckpointError, match=rf"^{re.escape(name)}: expected value \[64, 64\], got \[64, 63\]"):
            read_expert(checkpoint, config, 1, 6)


def unpack(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors with one matrix in plain form."""
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{prefix}.")}
    plain = dequantized(tensors[f"{prefix}.weight_packed"], tensors[f"{prefix}.weight_scale"])
    return rest | {f"{prefix}.weight": plain}


@pytest.mark.parametrize(
    ("expert", "named"), [("2.mlp.experts.9", "2.mlp.experts.9.up_proj.weight_packed"), ("1.mlp.experts.0", None)]
)
def test_a_mix_of_packed_and_plain_experts(
    tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]], expert: str, named: str | None
) -> None:
    config, tensors = tiny
    message = refusal(tmp_path, config, unpack(tensors, f"{LAYER}.{expert}.up_proj")).message
    assert message.startswith(f"{LAYER}.{named or expert + '.up_proj.weight_packed'}: expected routed experts that are")
    assert f"got {LAYER}.{expert}.up_proj.weight (in model.safetensors)" in message


def test_a_packed_expert_among_plain_ones(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    config, tensors = tiny
    message = refusal(tmp_path, config, unpack(tensors, f"{LAYER}.1.mlp.experts.0.gate_proj")).message
    assert message.startswith(f"{LAYER}.1.mlp.experts.0.up_proj.weight: expected routed experts that are all")
    assert f"got {LAYER}.1.mlp.experts.0.up_proj.weight_packed (in model.safetensors)" in message


def packed_parts(rows: int, columns: int) -> dict[str, Tensor]:
    q = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    return {
        "weight_packed": pack_int4(q),
        "weight_scale": torch.rand(rows, columns // 32).to(torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }


def test_other_layers_may_be_packed_too(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    """The presence of `weight_packed` decides, tensor by tensor."""
    config, tensors = tiny
    prefix = f"{LAYER}.1.mlp.shared_experts.up_proj"
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    parts = packed_parts(64, 64)
    write_tensors(tmp_path, rest | {f"{prefix}.{part}": tensor for part, tensor in parts.items()})
    with Checkpoint.open(tmp_path) as checkpoint:
        check_checkpoint(checkpoint, config)
        weight = checkpoint.read_linear(prefix)
    assert torch.equal(weight, dequantized(parts["weight_packed"], parts["weight_scale"]))


def test_packed_columns_that_are_no_whole_groups(tmp_path: Path, tiny: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    config, tensors = tiny
    name = f"{LAYER}.1.self_attn.q_b_proj.weight_packed"  # 48 input columns
    message = refusal(tmp_path, config, tensors | {name: torch.zeros(96, 6, dtype=torch.int32)}).message
    assert message == f"{name}: expected input columns in groups of 32, got 48 of them"


# The prototype of the demo model, with its vision tensors.


def test_demo_prototype() -> None:
    folder = SHARED / "prototypes" / "demo-model" / "checkpoint"
    if not folder.is_dir():
        pytest.skip(f"the prototype of the demo model is not at {folder}")
    config = ModelConfig.load(folder)
    tensors = read_tensors(folder)
    with Checkpoint.open(folder) as checkpoint:
        check_checkpoint(checkpoint, config)
        assert experts_packed(checkpoint, config)
        assert len(checkpoint.infos) == sum(1 for _ in expected_tensors(config, checkpoint.has))
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
        down = read_expert(checkpoint, config, 3, 31).down
    prefix = f"{LAYER}.3.mlp.experts.31.down_proj"
    assert isinstance(down, PackedWeight)
    exact = dequantized(tensors[f"{prefix}.weight_packed"], tensors[f"{prefix}.weight_scale"])
    assert torch.equal(down.dequantize(), exact)


def test_presence_is_asked_for_by_name() -> None:
    """`expected_tensors` works from any source of names, not only from an open checkpoint."""
    config = real_config()
    names: Callable[[bool], Counter[str]] = lambda packed: Counter(  # noqa: E731
        spec.name.rsplit(".", 1)[1] for spec in expected_tensors(config, lambda name: packed and ".experts." in name)
    )
    assert names(True)["weight_packed"] == 60 * 384 * 3
    assert names(False)["weight_packed"] == 0
    assert names(False)["weight"] - names(True)["weight"] == 60 * 384 * 3

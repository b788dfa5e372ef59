"""Which tensors the model needs, and the check that a checkpoint holds them, before anything large is loaded.

Tensors that are not named here (draft layers, the vision tower of a configuration that describes none) are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hybrid_k2.checkpoint.int4 import GROUP, VALUES_PER_WORD, PackedWeight
from hybrid_k2.checkpoint.reader import INDEX_NAME, SINGLE_NAME, Checkpoint, read_weight_map
from hybrid_k2.checkpoint.vision_tensors import BLOCKS as VISION_BLOCKS
from hybrid_k2.checkpoint.vision_tensors import vision_shapes
from hybrid_k2.config import ModelConfig, announces_int4
from hybrid_k2.errors import CheckpointError

PLAIN = ("BF16", "F16", "F32")
VISION = "vision"
Weight = PackedWeight | Tensor


@dataclass(frozen=True)
class TensorSpec:
    """Say what one tensor must be, and the group of the placement rules that it belongs to."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    what: str
    layer: int | None


@dataclass(frozen=True)
class ExpertWeights:
    """Hold the three matrices of one routed expert.

    Shapes: gate and up [moe_intermediate, hidden], down [hidden, moe_intermediate].
    """

    gate: Weight
    up: Weight
    down: Weight


def expected_tensors(config: ModelConfig, has: Callable[[str], bool]) -> Iterator[TensorSpec]:
    """List every tensor of the model: the text model layer by layer, then the vision tower where there is one.

    A linear layer of the text model is expected packed where `has` knows its `.weight_packed`; the routed experts are
    all alike, as the first one is.
    """
    root = f"{config.tensor_prefix}model"
    yield TensorSpec(f"{root}.embed_tokens.weight", (config.vocab_size, config.hidden_size), PLAIN, "embedding", None)
    packed = _first_expert_packed(config, has)
    for layer in range(config.num_hidden_layers):
        group = _Group(has, f"{root}.layers.{layer}", "attention", layer)
        yield from _attention(config, group)
        if layer in config.dense_layers:
            yield from _dense_mlp(config, group.named("dense_mlp"))
        else:
            yield from _mixture(config, group, packed)
    head = _Group(has, f"{config.tensor_prefix}lm_head", "lm_head", None)
    yield TensorSpec(f"{root}.norm.weight", (config.hidden_size,), PLAIN, "lm_head", None)
    yield from head.linear("", config.vocab_size, config.hidden_size)
    yield from vision_tensors(config)


def vision_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """List the tensors of the vision tower and its projector; none for a model that reads text only."""
    if config.vision is not None:
        for name, shape in vision_shapes(config.vision):
            yield TensorSpec(name, shape, PLAIN, VISION, None)


def check_checkpoint(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check that every tensor of the model is there with the right shape and dtype, and no layer too many.

    Raises: CheckpointError for the first tensor that is wrong, naming it, its file, and what was expected.
    """
    _refuse_more_layers(checkpoint, config)
    for spec in expected_tensors(config, checkpoint.has):
        info = checkpoint.infos.get(spec.name)
        if info is None:
            raise _missing(checkpoint, spec)
        where = f"(in {info.file.name})"
        if info.shape != spec.shape:
            raise CheckpointError(
                f"{spec.name}: expected shape {list(spec.shape)}, got {list(info.shape)} {where}",
                hint="the tensor does not fit config.json: one of the two is of another model",
            )
        if info.dtype not in spec.dtypes:
            raise CheckpointError(f"{spec.name}: expected dtype {' or '.join(spec.dtypes)}, got {info.dtype} {where}")


def experts_packed(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    """Say whether the routed experts are INT4 (`.weight_packed`) rather than plain (`.weight`)."""
    return _first_expert_packed(config, checkpoint.has)


def planned_packed(folder: Path, config: ModelConfig) -> bool:
    """Say whether the routed experts are INT4 by the index, and without one by the configuration.

    The files with the weights need not be there. Raises: CheckpointError, ConfigError.
    """
    if (folder / INDEX_NAME).exists():
        weight_map = read_weight_map(folder) or {}
        return _first_expert_packed(config, weight_map.__contains__)
    if (folder / SINGLE_NAME).exists():
        with Checkpoint.open(folder) as checkpoint:
            return experts_packed(checkpoint, config)
    return announces_int4(folder)


def read_expert(checkpoint: Checkpoint, config: ModelConfig, layer: int, expert: int) -> ExpertWeights:
    """Read one routed expert as it is stored.

    Raises: CheckpointError naming tensor and file, also where a stored `weight_shape` contradicts the matrix.
    """
    prefix = expert_prefix(config, layer, expert)

    def read(projection: str) -> Weight:
        name = f"{prefix}.{projection}"
        if checkpoint.has(f"{name}.weight_packed"):
            return checkpoint.read_packed(name)
        return checkpoint.read(f"{name}.weight")

    return ExpertWeights(read("gate_proj"), read("up_proj"), read("down_proj"))


def expert_prefix(config: ModelConfig, layer: int, expert: int) -> str:
    """Name one routed expert: what stands in front of `.gate_proj` and its like."""
    return f"{config.tensor_prefix}model.layers.{layer}.mlp.experts.{expert}"


@dataclass(frozen=True)
class _Group:
    """Build the specs of one group of one layer."""

    has: Callable[[str], bool]
    prefix: str
    what: str
    layer: int | None

    def named(self, what: str) -> _Group:
        return _Group(self.has, self.prefix, what, self.layer)

    def vector(self, name: str, size: int) -> TensorSpec:
        return TensorSpec(f"{self.prefix}.{name}.weight", (size,), PLAIN, self.what, self.layer)

    def linear(
        self, name: str, out_features: int, in_features: int, packed: bool | None = None
    ) -> Iterator[TensorSpec]:
        prefix = f"{self.prefix}.{name}" if name else self.prefix
        if packed is None:
            packed = self.has(f"{prefix}.weight_packed")
        if not packed:
            yield TensorSpec(f"{prefix}.weight", (out_features, in_features), PLAIN, self.what, self.layer)
            return
        if in_features % GROUP:
            raise CheckpointError(
                f"{prefix}.weight_packed: expected input columns in groups of {GROUP}, got {in_features} of them"
            )
        words, scales = in_features // VALUES_PER_WORD, in_features // GROUP
        yield TensorSpec(f"{prefix}.weight_packed", (out_features, words), ("I32",), self.what, self.layer)
        yield TensorSpec(f"{prefix}.weight_scale", (out_features, scales), ("BF16",), self.what, self.layer)
        yield TensorSpec(f"{prefix}.weight_shape", (2,), ("I32", "I64"), self.what, self.layer)

    def swiglu(self, name: str, hidden: int, inner: int, packed: bool | None = None) -> Iterator[TensorSpec]:
        yield from self.linear(f"{name}.gate_proj", inner, hidden, packed)
        yield from self.linear(f"{name}.up_proj", inner, hidden, packed)
        yield from self.linear(f"{name}.down_proj", hidden, inner, packed)


def _attention(config: ModelConfig, group: _Group) -> Iterator[TensorSpec]:
    heads = config.num_attention_heads
    yield group.vector("input_layernorm", config.hidden_size)
    yield from group.linear("self_attn.q_a_proj", config.q_lora_rank, config.hidden_size)
    yield group.vector("self_attn.q_a_layernorm", config.q_lora_rank)
    yield from group.linear("self_attn.q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
    yield from group.linear("self_attn.kv_a_proj_with_mqa", config.latent_dim, config.hidden_size)
    yield group.vector("self_attn.kv_a_layernorm", config.kv_lora_rank)
    yield from group.linear(
        "self_attn.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank
    )
    yield from group.linear("self_attn.o_proj", config.hidden_size, heads * config.v_head_dim)


def _dense_mlp(config: ModelConfig, group: _Group) -> Iterator[TensorSpec]:
    yield group.vector("post_attention_layernorm", config.hidden_size)
    yield from group.swiglu("mlp", config.hidden_size, config.intermediate_size)


def _mixture(config: ModelConfig, group: _Group, packed: bool) -> Iterator[TensorSpec]:
    router = group.named("router")
    yield router.vector("post_attention_layernorm", config.hidden_size)
    yield from router.linear("mlp.gate", config.n_routed_experts, config.hidden_size, packed=False)
    bias = f"{group.prefix}.mlp.gate.e_score_correction_bias"
    yield TensorSpec(bias, (config.n_routed_experts,), PLAIN, "router", group.layer)
    shared_inner = config.n_shared_experts * config.moe_intermediate_size
    yield from group.named("shared_experts").swiglu("mlp.shared_experts", config.hidden_size, shared_inner)
    routed = group.named("routed_experts")
    for expert in range(config.n_routed_experts):
        yield from routed.swiglu(
            f"mlp.experts.{expert}", config.hidden_size, config.moe_intermediate_size, packed=packed
        )


def _first_expert_packed(config: ModelConfig, has: Callable[[str], bool]) -> bool:
    return len(config.moe_layers) > 0 and has(
        f"{expert_prefix(config, config.moe_layers[0], 0)}.gate_proj.weight_packed"
    )


def _missing(checkpoint: Checkpoint, spec: TensorSpec) -> CheckpointError:
    other = _other_form(spec.name)
    if other is not None and (info := checkpoint.infos.get(other)) is not None:
        return CheckpointError(
            f"{spec.name}: expected routed experts that are all INT4 or all plain, like the first one, "
            f"got {other} (in {info.file.name})"
        )
    place = INDEX_NAME if (checkpoint.folder / INDEX_NAME).is_file() else SINGLE_NAME
    return CheckpointError(
        f"{spec.name}: expected {' or '.join(spec.dtypes)} {list(spec.shape)}, got no such tensor (in {place})",
        hint="config.json describes a vision tower (vision_config)" if spec.what == VISION else None,
    )


def _refuse_more_layers(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuse tensors of layers that the configuration does not count: without them the model would be cut short."""
    counts = {f"{config.tensor_prefix}model.layers": config.num_hidden_layers + config.num_draft_layers}
    if config.vision is not None:
        counts[VISION_BLOCKS] = config.vision.num_hidden_layers
    pattern = re.compile(rf"({'|'.join(map(re.escape, counts))})\.([0-9]+)")
    for name, info in checkpoint.infos.items():
        match = pattern.match(name)
        if match is not None and int(match[2][:10]) >= (count := counts[match[1]]):
            raise CheckpointError(
                f"{name}: expected layers 0..{count - 1} only, got layer {match[2]} (in {info.file.name})",
                hint="config.json has a smaller num_hidden_layers than the model that the tensors are from",
            )


def _other_form(name: str) -> str | None:
    if ".experts." not in name:
        return None
    return f"{name}_packed" if name.endswith(".weight") else name.removesuffix("_packed").removesuffix("_scale")

"""The configuration of the vision tower: what `vision_config` inside `config.json` says, checked field by field.

Two spellings are read: the original one (`vt_hidden_size`, `init_pos_emb_height`, ...) and that of transformers' own
saves (`hidden_size`, `pos_emb_height`, ..., with the projector's numbers beside `vision_config`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_k2.errors import ConfigError
from hybrid_k2.fields import Fields

MERGE = 2  # patches of a token on either side
COLORS = 3
LAYER_NORM_EPS = 1e-5  # of the tower; the projector's is in the configuration
ROPE_THETA = 10000.0

# Field, the one value that is implemented, and why any other is refused. An absent field means that value.
_FIXED_FIELDS: tuple[tuple[str, object, str], ...] = (
    ("pos_emb_type", "divided_fixed", "positions are a learned grid for a frame and fixed numbers for its time"),
    ("merge_kernel_size", [MERGE, MERGE], "two by two patches make a token"),
    ("merge_type", "sd2_tpool", "patches are merged within a frame"),
    ("video_attn_type", "spatial_temporal", "every patch attends to all others"),
    ("mm_projector_type", "patchmerger", "the projector norms patches, joins four and has two linear layers"),
    ("projector_hidden_act", "gelu", "the projector's activation is the exact GELU"),
    ("hidden_act", "gelu_pytorch_tanh", "the blocks' activation is the tanh form of GELU"),
)


@dataclass(frozen=True)
class VisionConfig:
    """Hold every number of the vision tower and its projector that the engine needs."""

    patch_size: int  # pixels on either side
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # inner width of the blocks' MLPs
    num_hidden_layers: int
    num_attention_heads: int
    grid_rows: int  # of the learned positions
    grid_columns: int
    text_hidden_size: int  # width of the language model, which the projector gives
    projector_norm_eps: float

    @property
    def head_dim(self) -> int:
        """Query, key and value columns per head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_values(self) -> int:
        """Numbers of one patch."""
        return COLORS * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Width of the patches of one token side by side."""
        return MERGE * MERGE * self.hidden_size

    @classmethod
    def from_fields(cls, top: Fields, text_hidden_size: int) -> VisionConfig | None:
        """Read `vision_config` of the whole configuration; None where it has none.

        Raises: ConfigError, UnsupportedModelError.
        """
        if not top.data.get("vision_config"):
            return None
        fields = Fields(top.json_object("vision_config"), f"{top.place}: vision_config")
        for name, expected, reason in _FIXED_FIELDS:
            fields.must_be(name, expected, reason)
        if fields.data.get("rope_parameters") is not None:
            rope = Fields(fields.json_object("rope_parameters"), f"{fields.place}: rope_parameters")
            rope.must_be("rope_type", "axial", "half of the rotary pairs turn with the column, half with the row")
            if "rope_theta" in rope.data and rope.number("rope_theta") != ROPE_THETA:
                rope.must_be("rope_theta", ROPE_THETA, "the rotary base of the vision tower is fixed")
        native = "hidden_size" in fields.data and "vt_hidden_size" not in fields.data
        prefix, grid = ("", "pos_emb") if native else ("vt_", "init_pos_emb")
        holder, eps = (top, "projection_layer_norm_eps") if native else (fields, "projector_ln_eps")
        config = cls(
            patch_size=fields.integer("patch_size"),
            hidden_size=fields.integer(f"{prefix}hidden_size"),
            intermediate_size=fields.integer(f"{prefix}intermediate_size"),
            num_hidden_layers=fields.integer(f"{prefix}num_hidden_layers"),
            num_attention_heads=fields.integer(f"{prefix}num_attention_heads"),
            grid_rows=fields.integer(f"{grid}_height"),
            grid_columns=fields.integer(f"{grid}_width"),
            text_hidden_size=text_hidden_size,
            projector_norm_eps=holder.number(eps) if eps in holder.data else LAYER_NORM_EPS,
        )
        _check_sizes(config, fields)
        _must_equal(fields, "mm_hidden_size", config.hidden_size)
        _must_equal(fields, "text_hidden_size", text_hidden_size)
        _must_equal(top, "projection_hidden_size", config.hidden_size)
        return config


def _check_sizes(config: VisionConfig, fields: Fields) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"{fields.place}: hidden size: expected a multiple of {config.num_attention_heads} (the heads), "
            f"got {config.hidden_size}"
        )
    if config.head_dim % 4:
        raise ConfigError(
            f"{fields.place}: columns of a head: expected a multiple of 4 (rotary pairs for rows and for columns), "
            f"got {config.head_dim}"
        )


def _must_equal(fields: Fields, name: str, expected: int) -> None:
    if name in fields.data and fields.integer(name) != expected:
        raise ConfigError(f"{fields.place}: {name}: expected {expected}, got {fields.integer(name)}")

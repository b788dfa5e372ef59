"""Random checkpoints in the original names and formats of K2.6, and their twins for the transformers library.

Names, shapes and packing are written out here a second time, on purpose: what the package reads is compared with what
an independent writer wrote.
"""

from __future__ import annotations

import base64
import copy
import json
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROPE_SCALING = {
    "type": "yarn",
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
TINY: dict[str, Any] = {
    "model_type": "kimi_k2",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "rope_theta": 50000.0,
    "rope_scaling": ROPE_SCALING,
    "max_position_embeddings": 262144,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
VISION: dict[str, Any] = {
    "patch_size": 14,
    "init_pos_emb_height": 8,
    "init_pos_emb_width": 8,
    "init_pos_emb_time": 4,
    "pos_emb_type": "divided_fixed",
    "vt_hidden_size": 48,
    "vt_num_hidden_layers": 2,
    "vt_num_attention_heads": 2,
    "vt_intermediate_size": 80,
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "video_attn_type": "spatial_temporal",
    "mm_projector_type": "patchmerger",
    "mm_hidden_size": 48,
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-5,
}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
                "actorder": None,
                "block_structure": None,
                "observer": "minmax",
                "observer_kwargs": {},
            },
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
}
# The named special tokens, counted from the first id behind the byte-pair vocabulary.
SPECIAL_TOKENS = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>",
    6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>", 17: "<|im_middle|>", 18: "<|media_begin|>",
    19: "<|media_content|>", 20: "<|media_end|>", 21: "<|media_pad|>", 22: "<think>", 23: "</think>",
    254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
KEPT_WHEN_SKIPPING = {11, 12, 13, 14, 15, 22, 23}  # flagged special=false by the real tokenizer


def write_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    packed: bool = True,
    shards: int = 1,
    model_type: str = "kimi_k25",
    dtype: torch.dtype = torch.bfloat16,
    vision: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of TINY sizes; `overrides` are fields of the text configuration, `vision` of the other.

    Activations and logits are O(1) and router logits have a spread of about 1.5, so that FP32 rounding does not
    change which experts are chosen. `kimi_k25` gets a tiny vision tower, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_dict(model_type=model_type, packed=packed, vision=vision, **overrides)
    text = config.get("text_config", config)
    source = torch.Generator().manual_seed(seed)
    prefix = "language_model." if model_type == "kimi_k25" else ""
    tensors = {prefix + name: tensor for name, tensor in _text_tensors(text, source, packed, dtype)}
    if model_type == "kimi_k25":
        towers = _vision_tensors(config["vision_config"], text["hidden_size"], source)
        tensors |= {name: tensor.to(dtype) for name, tensor in towers}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"max_length": 262144, "eos_token_id": config["eos_token_id"]})
    write_tensors(folder, tensors, shards)
    write_tokenizer(folder, text["vocab_size"])
    return folder


def config_dict(
    *, model_type: str = "kimi_k25", packed: bool = True, vision: dict[str, Any] | None = None, **overrides: Any
) -> dict[str, Any]:
    """Return the `config.json` of a TINY checkpoint as a dictionary."""
    if unknown := overrides.keys() - TINY.keys():
        raise TypeError(f"no such field of the text configuration: {sorted(unknown)}")
    first_special = overrides.get("vocab_size", TINY["vocab_size"]) - 256
    ids = {"bos_token_id": first_special, "eos_token_id": first_special + 2, "pad_token_id": first_special + 255}
    text = copy.deepcopy(TINY | overrides | ids)
    text["num_key_value_heads"] = text["num_attention_heads"]
    if packed:
        text["quantization_config"] = copy.deepcopy(QUANTIZATION)
    if model_type != "kimi_k25":
        return text | {"model_type": model_type}
    return {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "media_placeholder_token_id": first_special + 21,
        **ids,
        "text_config": text,
        "vision_config": VISION | {"text_hidden_size": text["hidden_size"]} | (vision or {}),
    }


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write `model.safetensors`, or several shards with their index; names go round the shards."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint with the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write `tiktoken.model` and `tokenizer_config.json`: all bytes, then pairs and triples of letters, then specials.

    The bytes are in the order of the real vocabulary (printable ones first), so that an id is not its byte.
    """
    ranks = vocab_size - 256
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [bytes([byte]) for byte in [*printable, *(b for b in range(256) if b not in printable)]]
    letters = " etaoinshrdlucmfwypvbgkjqxz"
    tokens += [(a + b).encode() for a, b in product(letters, letters[1:])]
    tokens += [(a + b + c).encode() for a, b, c in product(letters, letters[1:], letters[1:])]
    if not 256 <= ranks <= len(tokens):
        raise ValueError(f"vocab_size: expected 512..{len(tokens) + 256}, got {vocab_size}")
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens[:ranks])]
    (folder / "tiktoken.model").write_text("".join(lines))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(ranks + i): {"content": content, **flags, "special": i not in KEPT_WHEN_SKIPPING}
        for i, content in SPECIAL_TOKENS.items()
    }
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    _write_json(
        folder / "tokenizer_config.json",
        {"added_tokens_decoder": added, **names, "tokenizer_class": "TikTokenTokenizer", "model_max_length": 262144},
    )


def write_transformers_twin(folder_src: Path, folder_dst: Path) -> Path:
    """Write the same weights as transformers 5.23 reads them: FP32, experts dequantised to `.weight`, its own config.

    A `kimi_k25` source becomes a Kimi_K25ForConditionalGeneration, a text-only one a DeepseekV3ForCausalLM.
    """
    folder_dst.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder_src / "config.json").read_text())
    text = dict(config.get("text_config", config))
    text.pop("quantization_config", None)
    if "text_config" in config:
        text["model_type"] = "kimi_k2"
        config = transformers_config(config | {"text_config": text})
    else:
        config = text | {"model_type": "deepseek_v3"}
    _write_json(folder_dst / "config.json", config)
    tensors = {}
    for name, tensor in (source := read_tensors(folder_src)).items():
        if name.endswith(".weight_packed"):
            scale = source[name.replace("_packed", "_scale")]
            tensors[name.removesuffix("_packed")] = dequantized(tensor, scale)
        elif not name.endswith((".weight_scale", ".weight_shape")):
            tensors[name] = tensor.float().contiguous()
    save_file(tensors, folder_dst / "model.safetensors", metadata={"format": "pt"})
    return folder_dst


def transformers_config(config: dict[str, Any]) -> dict[str, Any]:
    """Spell the `config.json` of a `kimi_k25` as transformers does."""
    vision = config["vision_config"]
    twin_vision = {
        key: vision[f"vt_{key}"]
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    } | {f"pos_emb_{axis}": vision[f"init_pos_emb_{axis}"] for axis in ("height", "width", "time")}
    return {
        "model_type": "kimi_k25",
        "architectures": ["Kimi_K25ForConditionalGeneration"],
        "tie_word_embeddings": False,  # the class would tie them by default
        "image_token_id": config["media_placeholder_token_id"],
        "video_token_id": config["media_placeholder_token_id"] + 128,  # an id that the class needs and nobody uses
        "projection_hidden_size": vision["vt_hidden_size"],
        "text_config": config["text_config"],
        "vision_config": twin_vision
        | {"patch_size": vision["patch_size"], "merge_kernel_size": vision["merge_kernel_size"]},
    }


def load_transformers_twin(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load a twin with transformers in FP32 on the CPU; return the model and the library's loading report."""
    import transformers

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    names = {"kimi_k25": "Kimi_K25ForConditionalGeneration", "deepseek_v3": "DeepseekV3ForCausalLM"}
    model, report = getattr(transformers, names[kind]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), report


def dequantized(packed: Tensor, scale: Tensor) -> Tensor:
    """Return (nibble - 8) * scale, exactly, in FP32; a second, slower statement of the format."""
    columns = torch.arange(packed.shape[1] * 8)
    nibbles = (packed[:, columns // 8].long() >> (4 * (columns % 8))) & 0xF
    return (nibbles - 8).float() * scale.float()[:, columns // 32]


def _text_tensors(
    text: dict[str, Any], source: torch.Generator, packed: bool, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    hidden, heads, latent = text["hidden_size"], text["num_attention_heads"], text["kv_lora_rank"]

    def normal(*shape: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=source) * (gain / math.sqrt(shape[-1]))).to(dtype)

    def norm(size: int) -> Tensor:
        return (1 + 0.2 * torch.randn(size, generator=source)).to(dtype)

    def swiglu(prefix: str, inner: int) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}.gate_proj.weight", normal(inner, hidden, gain=1.5)
        yield f"{prefix}.up_proj.weight", normal(inner, hidden)
        yield f"{prefix}.down_proj.weight", normal(hidden, inner)

    yield "model.embed_tokens.weight", torch.randn(text["vocab_size"], hidden, generator=source).to(dtype)
    for layer in range(text["num_hidden_layers"]):
        root = f"model.layers.{layer}"
        attention = f"{root}.self_attn"
        qk, nope_v = text["qk_nope_head_dim"] + text["qk_rope_head_dim"], text["qk_nope_head_dim"] + text["v_head_dim"]
        yield f"{root}.input_layernorm.weight", norm(hidden)
        yield f"{attention}.q_a_proj.weight", normal(text["q_lora_rank"], hidden)
        yield f"{attention}.q_a_layernorm.weight", norm(text["q_lora_rank"])
        yield f"{attention}.q_b_proj.weight", normal(heads * qk, text["q_lora_rank"])
        yield f"{attention}.kv_a_proj_with_mqa.weight", normal(latent + text["qk_rope_head_dim"], hidden)
        yield f"{attention}.kv_a_layernorm.weight", norm(latent)
        yield f"{attention}.kv_b_proj.weight", normal(heads * nope_v, latent)
        yield f"{attention}.o_proj.weight", normal(hidden, heads * text["v_head_dim"])
        yield f"{root}.post_attention_layernorm.weight", norm(hidden)
        if layer < text["first_k_dense_replace"]:
            yield from swiglu(f"{root}.mlp", text["intermediate_size"])
            continue
        experts, inner = text["n_routed_experts"], text["moe_intermediate_size"]
        yield f"{root}.mlp.gate.weight", normal(experts, hidden, gain=1.5)
        yield f"{root}.mlp.gate.e_score_correction_bias", 0.1 * torch.randn(experts, generator=source)
        yield from swiglu(f"{root}.mlp.shared_experts", inner * text["n_shared_experts"])
        for expert in range(experts):
            for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                linear = f"{root}.mlp.experts.{expert}.{name}_proj"
                if packed:
                    yield from ((f"{linear}.{part}", value) for part, value in _int4(shape, source).items())
                else:
                    yield f"{linear}.weight", normal(*shape)
    yield "model.norm.weight", norm(hidden)
    yield "lm_head.weight", normal(text["vocab_size"], hidden)


def _int4(shape: tuple[int, int], source: torch.Generator) -> dict[str, Tensor]:
    """Draw an INT4 matrix with a spread of 1/sqrt(in): values over all of -8..7, log-normal scales."""
    rows, columns = shape
    q = (3 * torch.randn(shape, generator=source)).round().clamp(-8, 7).long()
    words = ((q + 8).view(rows, -1, 8) << (4 * torch.arange(8))).sum(-1)
    scale = (0.3 * torch.randn(rows, columns // 32, generator=source)).exp() / (3 * math.sqrt(columns))
    return {
        "weight_packed": torch.where(words < 2**31, words, words - 2**32).to(torch.int32),
        "weight_scale": scale.to(torch.bfloat16),
        "weight_shape": torch.tensor(shape, dtype=torch.int32),
    }


def _vision_tensors(vision: dict[str, Any], text_hidden: int, source: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    width, inner, merged = vision["vt_hidden_size"], vision["vt_intermediate_size"], 4 * vision["vt_hidden_size"]
    block = {"norm0": width, "norm1": width, "wqkv": (3 * width, width), "wo": (width, width)}
    block |= {"mlp.fc0": (inner, width), "mlp.fc1": (width, inner)}
    tower, patch = "vision_tower", vision["patch_size"]
    layers: dict[str, int | tuple[int, ...]] = {f"{tower}.patch_embed.proj": (width, 3, patch, patch)}
    for i in range(vision["vt_num_hidden_layers"]):
        layers |= {f"{tower}.encoder.blocks.{i}.{name}": shape for name, shape in block.items()}
    layers |= {f"{tower}.encoder.final_layernorm": width, "mm_projector.pre_norm": width}
    layers |= {"mm_projector.proj.0": (merged, merged), "mm_projector.proj.2": (text_hidden, merged)}
    grid = (vision["init_pos_emb_height"], vision["init_pos_emb_width"], width)
    yield f"{tower}.patch_embed.pos_emb.weight", 0.2 * torch.randn(grid, generator=source)
    for name, shape in layers.items():
        if isinstance(shape, int):
            yield f"{name}.weight", 1 + 0.2 * torch.randn(shape, generator=source)
        else:
            yield f"{name}.weight", torch.randn(shape, generator=source) / math.sqrt(math.prod(shape[1:]))
        yield f"{name}.bias", 0.1 * torch.randn(shape if isinstance(shape, int) else shape[0], generator=source)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2))

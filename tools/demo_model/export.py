"""Write a trained model in K2.6's checkpoint format, and read it back for scoring."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybrid_k2.checkpoint.int4 import dequantize_int4, quantize_int4

from .model import GROUP, ROPE_SCALING, Model, MoE, Shape
from .tokenizer import BASE, KEPT, RESERVED, SPECIALS

PREFIX = "language_model."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BOS, EOS, END, MEDIA_PAD, PAD = (BASE + i for i in (0, 1, 2, 21, 255))


def tensors(model: Model) -> dict[str, Tensor]:
    """Name and convert all tensors: routed experts INT4, correction bias FP32, the rest BF16."""
    out = {
        "model.embed_tokens.weight": bf16(model.embed_tokens),
        "model.norm.weight": bf16(model.norm.weight),
        "lm_head.weight": bf16(model.lm_head),
    }
    for i, block in enumerate(model.layers):
        place = f"model.layers.{i}."
        if isinstance(block.mlp, MoE):
            out |= {f"{place}mlp.{name}": t for name, t in mixture_tensors(block.mlp).items()}
        for name, p in block.named_parameters():
            if not (isinstance(block.mlp, MoE) and is_routed(name)):
                out[place + name] = bf16(p)
    return {PREFIX + name: t for name, t in out.items()}


def is_routed(name: str) -> bool:
    """Tell whether a parameter of a MoE block belongs to the router or the routed experts."""
    return name.startswith("mlp.") and not name.startswith("mlp.shared_experts.")


def mixture_tensors(moe: MoE) -> dict[str, Tensor]:
    """Convert the router and the routed experts of one layer."""
    out = {"gate.weight": bf16(moe.gate), "gate.e_score_correction_bias": moe.bias.float().clone()}
    for projection in PROJECTIONS:
        for e, weight in enumerate(getattr(moe, projection).detach()):
            name = f"experts.{e}.{projection}."
            out[name + "weight_packed"], out[name + "weight_scale"] = quantize_int4(weight)
            out[name + "weight_shape"] = torch.tensor(weight.shape, dtype=torch.int32)
    return out


def bf16(t: Tensor | nn.Parameter) -> Tensor:
    """Round to BF16."""
    return t.detach().to(torch.bfloat16).contiguous()


def config(shape: Shape) -> dict[str, Any]:
    """Write config.json with the real field names."""
    ids = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD}
    weights = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": GROUP, "num_bits": 4,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
    }  # fmt: skip
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    quantization = {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    text = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        **asdict(shape),
        "num_key_value_heads": shape.num_attention_heads,
        "rope_scaling": ROPE_SCALING,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": "bfloat16",
        **ids,
        "quantization_config": quantization,
    }
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        **ids,
        "ignore_index": -100,
        "media_placeholder_token_id": MEDIA_PAD,
        "tie_word_embeddings": False,
        "text_config": text,
    }


def tokenizer_config() -> dict[str, Any]:
    """Write tokenizer_config.json, the control tokens at K2.6's offsets."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens_decoder": {
            str(BASE + i): {"content": text, **flags, "special": i not in KEPT} for i, text in SPECIALS.items()
        },
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "model_max_length": 262144,
        "tokenizer_class": "TikTokenTokenizer",
    }


GENERATION = {"max_length": 262144, "eos_token_id": END, "do_sample": True, "temperature": 0.2, "top_p": 0.95}


def export(state: Path, vocabulary: Path, out: Path) -> None:
    """Write the checkpoint folder from a training state and its vocabulary."""
    model = Model()
    model.load_state_dict(torch.load(state, map_location="cpu")["model"])
    assert model.shape.vocab_size == BASE + RESERVED
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    (out / "tiktoken.model").write_bytes(vocabulary.read_bytes())
    for name, content in (
        ("config.json", config(model.shape)),
        ("tokenizer_config.json", tokenizer_config()),
        ("generation_config.json", GENERATION),
    ):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def load(folder: Path) -> Model:
    """Build the model again from the exported files alone."""
    return from_tensors(load_file(folder / "model.safetensors"))


def from_tensors(stored: dict[str, Tensor], shape: Shape | None = None) -> Model:
    """Build the model from the tensors of a checkpoint, everything in FP32."""
    model = Model(shape)
    state = {name: read(stored, name, old).float() for name, old in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def read(stored: dict[str, Tensor], name: str, old: Tensor) -> Tensor:
    """Find one tensor of our model under its name in the checkpoint."""
    if name == "lm_head":
        return stored[PREFIX + "lm_head.weight"]
    place = f"{PREFIX}model.{name}"
    if name.endswith("mlp.bias"):
        return stored[place.removesuffix("bias") + "gate.e_score_correction_bias"]
    if old.ndim == 3:  # the stacked experts
        mlp, projection = place.rsplit(".", 1)
        return torch.stack([dequantised(stored, f"{mlp}.experts.{e}.{projection}.") for e in range(old.shape[0])])
    return stored[place if place.endswith(".weight") else place + ".weight"]


def dequantised(stored: dict[str, Tensor], name: str) -> Tensor:
    """Return one expert matrix in FP32."""
    return dequantize_int4(stored[name + "weight_packed"], stored[name + "weight_scale"])

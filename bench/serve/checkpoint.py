"""A slice of K2.6 that a server can serve: its widths, a few layers, and the vocabulary of the demo model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from hybrid_k2.bench.slice import slice_fields, widths, write_slice
from hybrid_k2.config import ModelConfig
from hybrid_k2.demo import demo_path

_COPIED = ("tiktoken.model", "tokenizer_config.json", "generation_config.json")
_OF_THE_VOCABULARY = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def write_served_slice(folder: Path, layers: int, experts: int, scale: int = 1) -> None:
    """Write the checkpoint: one dense layer, then MoE layers with random weights (4 layers of 16 experts: 3.5 GB).

    scale: widths are divided by this.
    """
    demo = demo_path()
    of_demo = json.loads((demo / "config.json").read_text())
    fields = slice_fields(widths(scale), layers, experts)
    fields |= {name: {**of_demo, **of_demo["text_config"]}[name] for name in _OF_THE_VOCABULARY}
    (folder / "config.json").write_text(json.dumps(fields))
    for name in _COPIED:
        shutil.copy(demo / name, folder)
    torch.manual_seed(0)
    write_slice(folder, ModelConfig.from_dict(fields, str(folder / "config.json")))

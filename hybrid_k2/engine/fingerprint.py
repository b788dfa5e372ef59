"""Tell engines apart whose latents have other bits."""

from __future__ import annotations

import hashlib
import json

import torch

from hybrid_k2 import __version__
from hybrid_k2.engine.loading import LoadedModel


def fingerprint(loaded: LoadedModel) -> str:
    """Return a hash of everything that decides the bits of a latent: checkpoint, plan, software and CPU.

    Of the checkpoint that is its configuration, and name, size and time of change of each file with weights: reading
    the weights again would take as long as loading them.
    """
    plan, cache = loaded.plan, loaded.plan.kv_cache
    files = sorted(loaded.folder.glob("*.safetensors"))
    facts = {
        "version": __version__,
        "torch": [torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()],
        "config": hashlib.sha256((loaded.folder / "config.json").read_bytes()).hexdigest(),
        "weights": [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files],
        "rows": [[row.what, row.layers, row.device, row.dtype, row.hottest] for row in plan.rows],
        "deferred": plan.deferred,
        "numerics": [plan.numerics, plan.activation_dtype, plan.accelerator, loaded.text.experts_runtime.name],
        "gpus": [gpu.name for gpu in plan.machine.gpus],
        "cache": [cache.device, cache.dtype, cache.page_tokens, loaded.block_tokens],
        "nodes": len(plan.nodes),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

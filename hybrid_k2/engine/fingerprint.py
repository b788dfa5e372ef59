"""Tell engines apart whose latents have other bits."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path

import torch

from hybrid_k2 import __version__
from hybrid_k2.engine.loading import LoadedModel
from hybrid_k2.host.cpu import cpu_model
from hybrid_k2.native import native


def fingerprint(loaded: LoadedModel) -> str:
    """Return a hash of everything that decides the bits of a latent: checkpoint, plan, software, CPU and GPU.

    Of the checkpoint that is its configuration, and name, size and time of change of each file with weights: reading
    the weights again would take as long as loading them.
    """
    plan, cache = loaded.plan, loaded.plan.kv_cache
    files = sorted(loaded.folder.glob("*.safetensors"))
    facts = {
        "version": __version__,
        "kernels": None if native is None else hashlib.sha256(Path(native.__file__).read_bytes()).hexdigest(),
        "torch": [torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()],
        "triton": _version("triton"),
        "cpu": cpu_model(),  # torch's products choose their order of additions by it
        "config": hashlib.sha256((loaded.folder / "config.json").read_bytes()).hexdigest(),
        "weights": [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files],
        "rows": [[row.what, row.layers, row.device, row.dtype, row.hottest] for row in plan.rows],
        "numerics": [plan.numerics, plan.activation_dtype, plan.accelerator, loaded.text.experts_runtime.name],
        "gpus": [[gpu.name, gpu.capability] for gpu in plan.machine.gpus],
        # On a GPU the size of a batch decides who computes an expert, and by which kernel.
        "batches": [plan.stream, plan.chunk_tokens, plan.overlap, plan.graphs] if plan.accelerator else None,
        "deferred": plan.deferred,
        "cache": [cache.device, cache.dtype, cache.page_tokens, loaded.block_tokens],
        "nodes": len(plan.nodes),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

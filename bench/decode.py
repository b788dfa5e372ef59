"""Measure a whole decode step on the host, against the time that reading all its bytes takes.

    python bench/decode.py [--rules FILE|NAME] [--layers 4] [--experts 16] [--context 1024] [--steps 20]

Makes a random checkpoint with the widths of K2.6 in a temporary folder: one dense layer, the rest mixtures of 16
experts, a small vocabulary (about 3.5 GB; the head is not the point). Loads it by the rules and decodes one token at a
time behind a context. The floor is what the plan says a token reads, and the cached latents, over the read bandwidth
that is probed between the steps. `dispatch` is the same step on a model with the same layers and tiny widths: what is
left when there is nothing to compute.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from hybrid_k2.bench.slice import slice_config, widths, write_slice
from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.config import ModelConfig
from hybrid_k2.host.threads import NodeThreads
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.loader import load_text_model
from hybrid_k2.placement import Machine, load_rules, make_plan, shipped_names, shipped_rules

TINY = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 2,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip


def measure(config: ModelConfig, rules_name: str, context: int, steps: int, threads: int | None) -> dict[str, float]:
    """Decode `steps` tokens behind `context` random latents."""
    rules = shipped_rules(rules_name) if rules_name in shipped_names() else load_rules(rules_name)
    rules = replace(rules, kv_cache=replace(rules.kv_cache, tokens=context + steps + 64))
    with tempfile.TemporaryDirectory() as name:
        write_slice(Path(name), config)
        with Checkpoint.open(Path(name)) as checkpoint:
            plan = make_plan(rules, config, Machine.probe())
            if threads:
                plan = replace(plan, nodes=(NodeThreads(threads),))
            model = load_text_model(checkpoint, config, plan)
    cache = LatentCache(plan.kv_cache, config)
    pages = cache.pool.allocate(cache.pages_for(context + steps))
    for layer in cache.layers:
        layer.normal_()
    seconds, shares, raw = [], [], []
    row = config.latent_dim * cache.layers[0].element_size() * config.num_hidden_layers
    for step in range(steps):
        raw.append(model.experts_runtime.measure_read_gbps(0.02))
        batch = Batch.build([Chunk([step % config.vocab_size], context + step, pages)])
        start = time.perf_counter()
        model.forward(batch, cache)
        seconds.append(time.perf_counter() - start)
        floor = (plan.bytes_per_token + (context + step) * row) / raw[-1] / 1e9
        shares.append(floor / seconds[-1])
    threads_used = plan.threads
    model.close()
    return {
        "ms": median(seconds[2:]) * 1e3,
        "bytes": plan.bytes_per_token + context * row,
        "raw_read_gbps": median(raw),
        "share_of_floor": median(shares[2:]),
        "threads": threads_used,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default="host", help="a rule file, or the name of a shipped one")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    full, small = (slice_config(sizes, args.layers, args.experts, __file__) for sizes in (widths(), TINY))
    wide = measure(full, args.rules, args.context, args.steps, args.threads)
    tiny = measure(small, args.rules, 64, 4 * args.steps, round(wide["threads"]))
    wide["dispatch_ms"] = tiny["ms"]
    if args.json:
        print(json.dumps(wide))
        return
    print(f"{args.layers} layers, context {args.context}, {round(wide['threads'])} threads, rules {args.rules}")
    print(f"{wide['ms']:.1f} ms a token for {wide['bytes'] / 1e9:.2f} GB, raw read {wide['raw_read_gbps']:.1f} GB/s")
    print(f"{wide['share_of_floor']:.0%} of the floor; dispatch {tiny['ms']:.2f} ms = {tiny['ms'] / wide['ms']:.1%}")


if __name__ == "__main__":
    main()

"""Measure how fast experts of full width are loaded, against plain reads of the same files in the same run.

    python bench/loading.py [--experts 12] [--threads 1,2] [--rounds 5] [--folder DIR] [--json FILE]

Writes a checkpoint whose bytes are nearly all experts (25 MB each) into DIR and removes it at the end. `read` copies
the files into memory that is used again, as little as a reader can do; `load` reads, packs, checksums and writes to
fresh memory. Both go over all experts with the page cache warm, and cold where the system lets go of it. Runs are
interleaved and the best round counts: on a shared machine the others measure the neighbours. `per core` divides by the
processor time of all threads. The last line compares the peak of a whole load, in a process of its own, with the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hybrid_k2.checkpoint import Checkpoint, StoredExpert, expected_tensors
from hybrid_k2.config import ModelConfig
from hybrid_k2.experts import open_experts
from hybrid_k2.experts.cpu import NativeExperts

HIDDEN, INTERMEDIATE, VOCAB = 7168, 2048, 512
PIECE = 4 << 20  # bytes of a plain read
LAYER = 1
MODES = ("auto", "buffered", "direct")


def config_json(experts: int) -> dict[str, Any]:
    """Return a configuration with one layer of experts at the widths of K2.6, and everything else small."""
    rope = {"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "input_activations": None, "output_activations": None}}
    groups["group_0"]["weights"] = weights  # type: ignore[assignment]
    return {
        "model_type": "kimi_k2", "vocab_size": VOCAB, "eos_token_id": 2, "hidden_size": HIDDEN,
        "intermediate_size": 64, "moe_intermediate_size": INTERMEDIATE, "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1, "n_shared_experts": 1, "n_routed_experts": experts,
        "num_experts_per_tok": min(8, experts), "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 2.827, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
        "rope_scaling": rope | {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        "max_position_embeddings": 262144, "num_nextn_predict_layers": 0,
        "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
                                "quantization_status": "compressed", "config_groups": groups},
    }  # fmt: skip


def write_checkpoint(folder: Path, experts: int) -> None:
    """Write random weights in the checkpoint's form, one file of 100 MB for four experts."""
    (folder / "config.json").write_text(json.dumps(config_json(experts)))
    config, weight_map, part = ModelConfig.load(folder), {}, {}
    file = 1
    for spec in expected_tensors(config, lambda name: ".mlp.experts." in name):
        part[spec.name] = random_tensor(spec.name, spec.shape, spec.dtypes[0])
        weight_map[spec.name] = name = f"model-{file:05}.safetensors"
        if spec.name == "lm_head.weight" or sum(tensor.nbytes for tensor in part.values()) > 95_000_000:
            save_file(part, folder / name)
            part, file = {}, file + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def random_tensor(name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Return a tensor that a checkpoint may hold under this name."""
    if name.endswith("weight_shape"):
        down = "down_proj" in name
        return torch.tensor([HIDDEN, INTERMEDIATE] if down else [INTERMEDIATE, HIDDEN], dtype=torch.int32)
    if dtype == "I32":
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
    return torch.rand(shape).add_(0.5).mul_(0.01).to(torch.bfloat16)


@dataclass(frozen=True)
class Result:
    """What one way of reading all experts took, in the best of its rounds."""

    what: str
    cache: str
    threads: int
    gbps: float
    gbps_per_core: float

    def row(self) -> str:
        """One line of the table."""
        return f"{self.what:18}{self.cache:>6}{self.threads:9d}{self.gbps:8.2f}{self.gbps_per_core:12.2f}"


def plain_read(folder: Path, threads: int) -> int:
    """Read every file into one buffer per thread, and return the bytes."""
    paths = sorted(folder.glob("*.safetensors"))
    pieces = [(path, offset) for path in paths for offset in range(0, path.stat().st_size, PIECE)]
    files = {path: os.open(path, os.O_RDONLY) for path in paths}

    def read(first: int) -> int:
        buffer = memoryview(bytearray(PIECE))
        return sum(os.preadv(files[path], [buffer], offset) for path, offset in pieces[first::threads])

    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, range(threads)))
    for fd in files.values():
        os.close(fd)
    return total


def load(checkpoint: Checkpoint, config: ModelConfig, layer: NativeExperts, threads: int, mode: str) -> int:
    """Load every expert, and return the bytes."""

    def load_one(expert: int) -> int:
        stored = StoredExpert(checkpoint, config, LAYER, expert)
        layer.load_stored(expert, stored, mode=mode)  # type: ignore[arg-type]
        return stored.nbytes

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(load_one, range(config.n_routed_experts)))


def evict(folder: Path) -> None:
    """Ask the system to forget the files."""
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def timed(action: Callable[[], int]) -> tuple[float, float]:
    """Return bytes per second of wall clock and of processor time."""
    start, cpu_start = time.perf_counter(), time.process_time()
    nbytes = action()
    return nbytes / (time.perf_counter() - start), nbytes / (time.process_time() - cpu_start)


def measure(folder: Path, threads: int, rounds: int) -> list[Result]:
    """Time plain reads and loads in turns, with the page cache warm and cold."""
    config = ModelConfig.load(folder)
    runtime = open_experts("exact", 1)
    best: dict[tuple[str, str], tuple[float, float]] = {}

    def note(what: str, cache: str, action: Callable[[], int]) -> None:
        if cache == "cold":
            evict(folder)
        speed, per_core = timed(action)
        before = best.get((what, cache), (0.0, 0.0))
        best[what, cache] = max(speed, before[0]), max(per_core, before[1])

    with Checkpoint.open(folder) as checkpoint:
        for cache, _ in product(("warm", "cold"), range(rounds)):
            if cache == "warm":
                plain_read(folder, threads)
            note("read", cache, lambda: plain_read(folder, threads))
            for mode in MODES:
                layer = runtime.make_layer(HIDDEN, INTERMEDIATE, config.n_routed_experts, config.num_experts_per_tok)
                assert isinstance(layer, NativeExperts)
                note(f"load, {mode}", cache, lambda: load(checkpoint, config, layer, threads, mode))  # noqa: B023
                layer.close()
    runtime.close()
    return [Result(what, cache, threads, a / 1e9, b / 1e9) for (what, cache), (a, b) in best.items()]


PEAK = """
import re, sys
from pathlib import Path
from hybrid_k2.checkpoint import Checkpoint, experts_packed
from hybrid_k2.config import ModelConfig
from hybrid_k2.experts import open_experts
from hybrid_k2.model.loader import load_text_model
from hybrid_k2.placement import Machine, make_plan, shipped_rules

open_experts("exact", 1).close()

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

config = ModelConfig.load(Path(sys.argv[1]))
with Checkpoint.open(Path(sys.argv[1])) as checkpoint:
    plan = make_plan(shipped_rules("host"), config, Machine.probe(), experts_packed=True)
    before = memory("VmRSS")
    model = load_text_model(checkpoint, config, plan)
print(memory("VmHWM") - before, plan.bytes_on("host") - plan.kv_cache.nbytes)
"""


def peak(folder: Path) -> tuple[int, int]:
    """Load the whole checkpoint in a process of its own; return the memory it took at most, and the plan's."""
    result = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True)
    taken, planned = re.findall(r"\d+", result.stdout)
    return int(taken), int(planned)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the file system to be measured; default: the temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_checkpoint(folder, args.experts)
        os.sync()  # what is not on the disk yet cannot be forgotten
        results = [
            one for threads in map(int, args.threads.split(",")) for one in measure(folder, threads, args.rounds)
        ]
        taken, planned = peak(folder)
    print(f"{args.experts} experts, {args.rounds} rounds, best; GB/s")
    print("what               cache  threads    GB/s    per core")
    for result in results:
        print(result.row())
    print(f"peak of a whole load: {taken / 1e6:.0f} MB, plan {planned / 1e6:.0f} MB: {(taken - planned) / 1e6:+.0f} MB")
    if args.json:
        figures = {"results": [asdict(result) for result in results], "peak_bytes": taken, "plan_bytes": planned}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Measure how long an image takes through the vision tower at the widths of K2.6, and what the CPU multiplies at best.

    python bench/vision.py [--sizes 448x448,1920x1080] [--dtype bf16] [--layers 2] [--rounds 3] [--threads N]

The model has random weights and so many blocks; the time of all 27 is an estimate from those. The limit
is the rate of torch's product of 2048 x 4608 x 4608 numbers in the dtype that the tower multiplies in, measured in
turns with the images: `of the limit` counts multiplications and additions of linear layers and attention alone. With
one thread times are the process's, which other programs do not lengthen; with more the wall clock's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.bench.slice import k26_config
from hybrid_k2.model.devices import torch_dtype
from hybrid_k2.model.vision import Affine, Block, LayerNorm, Projector, VisionModel
from hybrid_k2.model.vision_loading import product_dtype
from hybrid_k2.protocol import Image, ImageFormat
from hybrid_k2.vision_config import VisionConfig

Clock = Callable[[], float]
PROBE_ROWS, PROBE_WIDTH = 2048, 4608


def random_model(config: VisionConfig, dtype: torch.dtype) -> VisionModel:
    """Draw weights that keep numbers at their size."""
    multiplied = product_dtype("host", dtype)

    def affine(outputs: int, inputs: int) -> Affine:
        weight = torch.randn(outputs, inputs) / inputs**0.5
        return Affine(weight.to(dtype), torch.zeros(outputs, dtype=dtype), multiplied)

    width, inner, merged = config.hidden_size, config.intermediate_size, config.merged_size
    norm = LayerNorm(torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype))
    blocks = [
        Block(norm, affine(3 * width, width), affine(width, width), norm, affine(inner, width), affine(width, inner))
        for _ in range(config.num_hidden_layers)
    ]
    return VisionModel(
        config,
        affine(width, config.patch_values),
        torch.randn(config.grid_rows, config.grid_columns, width).to(dtype),
        blocks,
        norm,
        Projector(norm, affine(merged, merged), affine(config.text_hidden_size, merged)),
        torch.float32,
    )


def noise(width: int, height: int) -> Image:
    """Draw an image of this size, as large as one of a user becomes."""
    form = ImageFormat()
    width, height = form.fit(width, height)
    side = form.patch_size * form.merge
    pixels = np.random.default_rng(0).integers(0, 256, (-(-height // side) * side, -(-width // side) * side, 3))
    return Image(pixels.astype(np.uint8), form)


def operations(config: VisionConfig, patches: int) -> tuple[int, int]:
    """Count multiplications and additions of one block, and of all else."""
    width, merged = config.hidden_size, config.merged_size
    block = 2 * patches * width * (4 * width + 2 * config.intermediate_size) + 4 * patches**2 * width
    rest = 2 * patches * width * config.patch_values + patches // 2 * merged * (merged + config.text_hidden_size)
    return block, rest


def timed_steps(model: VisionModel, image: Image, clock: Clock) -> list[float]:
    """Encode an image and return the seconds of each step."""
    encoding, seconds, done = model.begin(image), [], False
    while not done:
        start = clock()
        done = encoding.step()
        seconds.append(clock() - start)
    return seconds


def probe(weight: Tensor, rows: Tensor, clock: Clock) -> float:
    """Return the operations per second of one large product."""
    start = clock()
    functional.linear(rows, weight)
    return 2 * rows.numel() * len(weight) / (clock() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="448x448,1920x1080", help="WIDTHxHEIGHT, with commas")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    k26 = k26_config().vision
    assert k26 is not None
    config = replace(k26, num_hidden_layers=args.layers)
    model = random_model(config, torch_dtype(args.dtype))
    weight = model.projector.inner.weight.to(model.embed.dtype)
    rows = torch.randn(PROBE_ROWS, PROBE_WIDTH).to(model.embed.dtype)
    print(f"{args.threads} threads, weights {args.dtype}, products {str(model.embed.dtype).removeprefix('torch.')}")
    print("     image  patches  tokens  block ms  rest ms   GFLOPS  limit  of the limit  27 blocks, estimated")
    for size in args.sizes.split(","):
        image = noise(*map(int, size.split("x")))
        patches = 4 * image.tokens
        model.encode(noise(448, 448))  # what torch prepares at its first call
        blocks, rests, limits = [], [], [probe(weight, rows, clock)]
        for _ in range(args.rounds):
            first, *between, last = timed_steps(model, image, clock)
            blocks.append(sum(between) / args.layers)
            rests.append(first + last)
            limits.append(probe(weight, rows, clock))
        block, rest, limit = median(blocks), median(rests), median(limits) / 1e9
        of_block, of_rest = operations(config, patches)
        rate = (of_block + of_rest) / (block + rest) / 1e9
        print(
            f"{size:>10} {patches:8} {image.tokens:7} {block * 1e3:9.1f} {rest * 1e3:8.1f} {rate:8.0f} {limit:6.0f} "
            f"{rate / limit:12.0%}  {k26.num_hidden_layers * block + rest:10.1f} s"
        )


if __name__ == "__main__":
    main()

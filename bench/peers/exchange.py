"""What the processes of a comparison share: sizes, and arrays in a folder. Needs numpy alone, in any environment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

GROUP = 32  # weights that share a scale
BYTES_PER_GROUP = 18  # 16 of values, 2 of scale
MATRICES = ("gate", "up", "down")

Array = NDArray[Any]


@dataclass(frozen=True)
class Sizes:
    """Name the sizes of the layer that everybody computes.

    distinct: so many experts have values of their own; the others repeat them, at other places in memory.
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    most_tokens: int
    distinct: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as the checkpoint has them."""
        return 3 * self.hidden * self.intermediate * BYTES_PER_GROUP // GROUP

    def operations(self, tokens: int) -> float:
        """Count multiplications and additions of one call."""
        return 6.0 * tokens * self.top_k * self.hidden * self.intermediate


@dataclass(frozen=True)
class Matrix:
    """Hold one matrix as the checkpoint does.

    Shapes: words [rows, inputs / 8] int32, the first input lowest, each as value + 8; scales [rows, inputs / 32] the
    bits of bf16.
    """

    words: Array
    scales: Array


class Layer(Protocol):
    """Compute the layer in one process. `prepare` and `output` are not timed."""

    about: dict[str, Any]

    def prepare(self, hidden: Array, ids: Array, weights: Array) -> None:
        """Take what `run` shall compute. Shapes: hidden [T, H] bits of bf16, ids [T, K] int32, weights [T, K] fp32."""

    def run(self) -> None:
        """Compute it."""

    def output(self) -> Array:
        """Return the result. Shapes: -> [T, H] fp32."""


def write_expert(folder: Path, number: int, matrices: dict[str, Matrix]) -> None:
    """Write one of the distinct experts."""
    for name, matrix in matrices.items():
        np.save(folder / f"expert{number}.{name}.words.npy", matrix.words)
        np.save(folder / f"expert{number}.{name}.scales.npy", matrix.scales)


def read_matrix(folder: Path, number: int, name: str) -> Matrix:
    """Map a matrix of one of the distinct experts; the pages stay in the page cache, once for all processes."""
    words, scales = (
        np.load(folder / f"expert{number}.{name}.{part}.npy", mmap_mode="r") for part in ("words", "scales")
    )
    return Matrix(words, scales)


def read_experts(folder: Path, sizes: Sizes) -> Iterator[tuple[int, dict[str, Matrix]]]:
    """Go through all experts of the layer."""
    distinct = [{name: read_matrix(folder, number, name) for name in MATRICES} for number in range(sizes.distinct)]
    for expert in range(sizes.experts):
        yield expert, distinct[expert % sizes.distinct]


def widen(bits: Array) -> Array:
    """Turn the bits of bf16 into fp32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

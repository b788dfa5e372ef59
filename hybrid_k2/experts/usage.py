"""How often the experts of a checkpoint are used: counted while it computes, and remembered for the next start."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid_k2.experts.remembered import cache_folder, recall, remember

Counts = Mapping[int, Sequence[int]]  # layer -> how often each of its experts was chosen
MOST = 1 << 60  # no counter comes as far; a file that says more is damaged, and would not fit one


class ExpertUse(NamedTuple):
    """Say how often each expert of a layer was chosen so far, and which of them the accelerator holds."""

    counts: list[int]
    hot: list[int]


class LayerUsage:
    """Count how often each expert of one layer is chosen, where the router's numbers are, without waiting for it.

    Any thread may read the counts meanwhile.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        """Go on counting from here."""
        self._counts = torch.tensor(counts, dtype=torch.int64, device=device)  # [E]
        self._seen = torch.zeros(2, dtype=torch.int64, device=device)  # choices, and those of them that were hot
        on_cpu = self._counts.device.type == "cpu"
        self._in_numpy = (self._counts.numpy(), self._seen.numpy()) if on_cpu else None  # the same memory

    def add(self, ids: Tensor, on_host: Tensor, live: Tensor | None = None) -> None:
        """Count one batch; `on_host` is -1 where a chosen expert is hot, `live` says which rows count (None: all).

        Shapes: ids, on_host [T, K] int32, live [T] bool, on the device of the counts.
        """
        if self._in_numpy is not None:  # a few us: a third of what torch takes for so few numbers
            self._add_in_numpy(*self._in_numpy, ids, on_host, live)
            return
        numbers = ids.long()
        counted = torch.ones_like(numbers) if live is None else live.long()[:, None].expand_as(numbers)  # [T, K]
        self._counts.scatter_add_(0, numbers.flatten(), counted.flatten())
        self._seen[0] += numbers.numel() if live is None else counted.sum()
        if on_host is not ids:
            self._seen[1] += torch.where(on_host < 0, counted, 0).sum()

    @staticmethod
    def _add_in_numpy(
        counts: NDArray[np.int64], seen: NDArray[np.int64], ids: Tensor, on_host: Tensor, live: Tensor | None
    ) -> None:
        rows = slice(None) if live is None else live.numpy()
        numbers = ids.numpy()[rows]
        counts += np.bincount(numbers.ravel(), minlength=len(counts))
        seen[0] += numbers.size
        if on_host is not ids:
            seen[1] += np.count_nonzero(on_host.numpy()[rows] < 0)

    def take_hit_rate(self) -> float | None:
        """Return the part of the choices since the last call that were hot experts; None where there were none."""
        choices, hits = self._seen.tolist()
        self._seen.zero_()
        return hits / choices if choices else None

    def counts(self) -> list[int]:
        """Return how often each expert was chosen; waits for the device."""
        return [int(count) for count in self._counts.tolist()]

    def fade(self) -> None:
        """Halve all counts, so that what comes weighs more than what is long ago."""
        self._counts.floor_divide_(2)


def recall_usage(checkpoint: Path, layers: Iterable[int], experts: int, folder: Path | None = None) -> Counts:
    """Return what was remembered of this checkpoint on this machine; empty where nothing fits these layers."""
    found = recall(_file(checkpoint, folder), _key(checkpoint))
    counts = found.get("counts") if found is not None else None
    if not isinstance(counts, dict) or counts.keys() != {str(layer) for layer in layers}:
        return {}
    if not all(_are_counts(each, experts) for each in counts.values()):
        return {}
    return {int(layer): each for layer, each in counts.items()}


def remember_usage(checkpoint: Path, counts: Counts, folder: Path | None = None) -> None:
    """Keep the counts for the next start.

    Effects: writes one small file into `folder` (by default the user's cache); where that fails, nothing is remembered.
    """
    remember(_file(checkpoint, folder), _key(checkpoint), {"counts": {str(i): list(c) for i, c in counts.items()}})


def _are_counts(values: Any, experts: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == experts
        and all(type(count) is int and 0 <= count <= MOST for count in values)
    )


def _key(checkpoint: Path) -> str:
    return f"{checkpoint.resolve()} on {platform.node()}"


def _file(checkpoint: Path, folder: Path | None) -> Path:
    digest = hashlib.sha256(_key(checkpoint).encode("utf-8", "surrogateescape")).hexdigest()
    return (folder or cache_folder()) / f"usage-{digest[:16]}.json"

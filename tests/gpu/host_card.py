"""A card made of the host, so that plans for a GPU load and run without one: Triton's kernels are interpreted.

What stays untested is CUDA itself: streams, events, pinned and mapped memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hybrid_k2.accelerator import Accelerator, Label, handoff_cuda
from hybrid_k2.accelerator.cuda import Peer
from hybrid_k2.experts.usage import LayerUsage
from hybrid_k2.model import loader, stream_loading
from hybrid_k2.placement import Gpu, Machine
from tests.gpu.recorder import Recorder


class HostCard(Accelerator):
    """Execute what is launched at once; tell peers of steps as CudaAccelerator does. Graphs are those of Recorder."""

    captures = True

    def __init__(self, device: torch.device) -> None:
        self.name, self.device = "cuda:0", device
        self.peers: list[Peer] = []
        self.steps = 0
        self.recordings: list[Recorder] = []
        self._running = False

    def attach(self, peer: Peer) -> None:
        self.peers.append(peer)

    def enqueue(self, op: Callable[[], None], label: Label) -> None:
        if not self._running:
            self._running = True
            for peer in self.peers:
                peer.begin()
        with torch.inference_mode():
            op()

    def capture(self, op: Callable[[], None]) -> Callable[[], None]:
        self.recordings.append(Recorder())
        return self.recordings[-1].record(op)

    @contextmanager
    def span(self, label: Label) -> Iterator[None]:
        yield

    def synchronize(self, timeout_s: float | None = None) -> None:
        self.steps += 1
        try:
            for peer in self.peers:
                peer.end()
        finally:
            self.abandon()

    def abandon(self) -> None:
        self._running = False
        for peer in self.peers:
            peer.rest()

    def close(self) -> None:
        return

    def drain(self, timeout_s: float | None) -> bool:
        for peer in self.peers:
            peer.release()
        return True


class _Runtime:
    """Maps and pins nothing: host and card are one."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 (CUDA's name)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 (CUDA's name)
        return 0


class _CardUsage(LayerUsage):
    """Count by operations of torch, as on a card: what records and repeats them sees no others."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        super().__init__(counts, device)
        self._in_numpy = None


def use_host_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine have a GPU, "cuda:0", that is the host; nothing changes where there is one."""
    if torch.cuda.is_available():
        return
    probed = Machine.probe()
    machine = Machine(probed.host_memory_bytes, probed.host_available_bytes, 1, (Gpu(0, "Test GPU", 8 << 30),))
    monkeypatch.setattr(Machine, "probe", lambda: machine)
    for module in ("loader", "part_loading", "latent_cache", "hot_loading", "stream_loading"):
        monkeypatch.setattr(f"hybrid_k2.model.{module}.torch_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(loader, "CudaAccelerator", HostCard)
    monkeypatch.setattr("hybrid_k2.model.hot_loading.LayerUsage", _CardUsage)
    monkeypatch.setattr(stream_loading, "PinnedMemory", lambda ranges: None)
    runtime: Any = _Runtime()
    monkeypatch.setattr(handoff_cuda, "_runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)

"""The experts on the native kernels.

Weights are brought into layout L32 while they are loaded, into one allocation per layer. See docs/kernels.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid_k2.checkpoint import ExpertWeights, PackedWeight, StoredExpert
from hybrid_k2.errors import EngineError, MemoryBudgetError
from hybrid_k2.experts.base import ExpertsBackend, ExpertsRuntime, ExpertsShape, check_slot
from hybrid_k2.experts.isa import IsaFact
from hybrid_k2.experts.l32 import L32Expert
from hybrid_k2.experts.read_probe import probe_bytes
from hybrid_k2.experts.tuning import Tuning, machine_key, remembered_tuning
from hybrid_k2.host.binding import warn_unbound
from hybrid_k2.host.threads import NodeThreads
from hybrid_k2.native import native as _native

log = logging.getLogger("hybrid_k2")

ReadMode = Literal["auto", "buffered", "direct"]


def native_isas() -> list[IsaFact]:
    """List the instruction sets of the extension, best first; empty where it cannot be imported."""
    if _native is None:
        return []
    return [
        IsaFact(name, bool(numerics), supported=not missing, missing=tuple(missing), numerics=tuple(numerics))
        for name, numerics, missing in _native.instruction_sets()
    ]


def features_of(
    leaf1_ecx: int, leaf7_ebx: int, leaf7_ecx: int, leaf7_edx: int, leaf7_1_eax: int, xcr0: int
) -> list[str]:
    """Name the CPU features that these CPUID registers and XCR0 report, of those that the kernels ask for."""
    return list(_native.features_of(leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax, xcr0))


def as_array(tensor: Tensor) -> Any:
    """Return the tensor as a contiguous numpy array; bf16 becomes its bits as uint16."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class NativeExperts(ExpertsBackend):
    """Compute a layer on the runtime's threads; the calling thread sleeps or does something else meanwhile."""

    def __init__(self, shape: ExpertsShape, runtime: Any, room: int | None = None) -> None:
        """Take memory for `room` of the experts, or for all of them."""
        super().__init__(shape)
        self._layer = _native.Layer(
            runtime,
            shape.hidden_size,
            shape.moe_intermediate_size,
            shape.n_routed_experts,
            shape.num_experts_per_tok,
            shape.n_routed_experts if room is None else room,
        )

    @property
    def native(self) -> Any:
        """The extension's layer."""
        return self._layer

    @property
    def nbytes(self) -> int:
        """See ExpertsBackend."""
        return int(self._layer.nbytes)

    @property
    def bound(self) -> bool:
        """Whether the weights are on the NUMA nodes that the plan gave them; True where it gave none."""
        return bool(self._layer.bound)

    @property
    def huge_page_share(self) -> float | None:
        """The part of the loaded weights that the system put on huge pages, 0 to 1; None while none are loaded.

        Effects: walks the page tables of the process, which takes seconds for hundreds of GB on plain pages.
        """
        share = self._layer.huge_page_share
        return None if share is None else float(share)

    def load_expert(self, expert: int, weights: ExpertWeights) -> None:
        """See ExpertsBackend.

        Raises: CheckpointError for a scale that is not finite or too large to compute with.
        """
        self.shape.check_expert(expert, weights)
        arrays = []
        for name in ("gate", "up", "down"):
            weight = getattr(weights, name)
            if not isinstance(weight, PackedWeight):
                raise ValueError(f"expert {expert}, {name}: expected INT4 weights, got plain {weight.dtype}")
            arrays += [as_array(weight.packed), as_array(weight.scale)]
        self._layer.load_expert(expert, *arrays)

    def load_stored(self, expert: int, stored: StoredExpert, *, mode: ReadMode = "auto") -> None:
        """See ExpertsBackend; reads and packs a few rows at a time on the calling thread, without the interpreter.

        `mode`: what the page cache holds from there and the rest past it, or all of it one way, to compare them.
        """
        files = {info: stored.checkpoint.file_of(info) for info in stored.packed_infos()}
        tensors = [(i.name, str(i.file), file.fileno(i.name), i.offset, i.nbytes) for i, file in files.items()]
        self._layer.load_stored(expert, tensors, getattr(_native.ReadMode, mode))
        for file, info in {file: info for info, file in files.items()}.items():  # each file once
            file.check_unchanged(info.name)

    def holds(self, expert: int) -> bool:
        """Say whether an expert is loaded."""
        return bool(self._layer.loaded(expert))

    def read_expert(self, expert: int) -> ExpertWeights:
        """Return one expert's weights in the checkpoint's form, bit for bit as they were loaded.

        Raises: ValueError if it was not loaded.
        """
        gate, gate_scale, up, up_scale, down, down_scale = map(torch.from_numpy, self._layer.read_expert(expert))
        return ExpertWeights(
            PackedWeight(gate, gate_scale.view(torch.bfloat16)),
            PackedWeight(up, up_scale.view(torch.bfloat16)),
            PackedWeight(down, down_scale.view(torch.bfloat16)),
        )

    def read_l32(self, expert: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return a copy of one expert in layout L32.

        Shapes: w13 [I/16, H/32, 576], w2 [H/32, I/32, 576].
        Raises: ValueError if it was not loaded.
        """
        w13, w2 = self._layer.read_l32(expert)
        return w13, w2

    def copy_expert(self, expert: int) -> L32Expert:
        """Return a copy of one expert, which is checked; computations may run meanwhile.

        Raises: EngineError if its weights are not the ones that were loaded; ValueError if it was not loaded.
        """
        weights = self.read_l32_expert(expert)
        self.check_copy(expert, weights)
        return weights

    def read_l32_expert(self, expert: int) -> L32Expert:
        """Return a copy of one expert, which is not checked. Raises: ValueError if it was not loaded."""
        return L32Expert(*self.read_l32(expert), self.checksum(expert))

    def view_expert(self, expert: int) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Return the memory of one expert itself, of each NUMA node with its n groups of 32 intermediate channels.

        Shapes: w13 [2 n, H/32, 576], w2 [H/32, n, 576].
        Raises: ValueError if it was not loaded.
        """
        return list(self._layer.view_expert(expert))

    def memory(self) -> list[tuple[int, int]]:
        """Return address and bytes of the weights' memory, of each NUMA node."""
        return list(self._layer.memory())

    def store_expert(self, expert: int, weights: L32Expert) -> None:
        """Take over one expert from a copy; as `load_expert` for threads and errors."""
        self._layer.store_expert(expert, weights.w13, weights.w2, weights.checksum)

    def check_copy(self, expert: int, weights: L32Expert) -> None:
        """Check that a copy of an expert has the weights that were loaded. Raises: EngineError if it has not."""
        self._check(expert, weights.checksum, int(self._layer.l32_checksum(weights.w13, weights.w2)))

    def replace_expert(self, old: int, new: int, weights: L32Expert) -> None:
        """Put another expert into the place of `old`, which is gone then; nothing of the layer may compute meanwhile.

        Raises: ValueError if `old` is not loaded, or the other one is.
        """
        self._layer.replace_expert(old, new, weights.w13, weights.w2, weights.checksum)

    def checksum(self, expert: int) -> int:
        """Return the checksum of one expert's weights, computed while they were loaded.

        Raises: ValueError if it was not loaded.
        """
        return int(self._layer.checksum(expert))

    def verify(self, expert: int) -> None:
        """Check that one expert's weights in memory are the ones that were loaded.

        Raises: EngineError if they are not; ValueError if it was not loaded.
        """
        self._check(expert, self.checksum(expert), int(self._layer.memory_checksum(expert)))

    @staticmethod
    def _check(expert: int, loaded: int, now: int) -> None:
        if now != loaded:
            raise EngineError(
                f"expert {expert}: expected weights with checksum {loaded:016x}, as they were loaded, got {now:016x}",
                hint="the host's memory is damaged: load the model again, and test the memory",
            )

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertsBackend."""
        self.shape.check_call(hidden, ids, weights)
        output = torch.empty(hidden.shape, dtype=torch.float32)
        self._layer.forward(as_array(hidden), as_array(ids), as_array(weights), output.numpy())
        return output

    def submit(self, slot: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See ExpertsBackend."""
        check_slot(slot)
        self.shape.check_call(hidden, ids, weights)
        self._layer.submit(slot, as_array(hidden), as_array(ids), as_array(weights))

    def wait(self, slot: int, timeout_s: float | None = None) -> Tensor:
        """See ExpertsBackend; an interrupt (Ctrl-C) ends the computation and frees the slot."""
        check_slot(slot)
        if timeout_s is not None and not timeout_s >= 0:
            raise ValueError(f"timeout_s: expected at least 0, got {timeout_s}")
        output = torch.empty(self._layer.slot_tokens(slot), self.shape.hidden_size)
        if not self._layer.wait(slot, output.numpy(), -1.0 if timeout_s is None else timeout_s):
            raise EngineError(f"experts, slot {slot}: expected a result within {timeout_s} s, got none")
        return output

    def close(self) -> None:
        """See ExpertsBackend."""
        self._layer.close()


class NativeRuntime(ExpertsRuntime):
    """Own the native threads and the chosen kernels."""

    def __init__(self, isa: str, threads: int, numerics: str = "exact", nodes: Sequence[NodeThreads] = ()) -> None:
        spread = [(node.threads, node.node, node.cpus) for node in nodes]
        self._runtime = self.native = _native.Runtime(isa, threads, numerics, spread)
        self.isa = isa
        self.name = f"native {isa}, {numerics} ({self._runtime.activations})"

    def make_layer(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        n_routed_experts: int,
        num_experts_per_tok: int,
        room: int | None = None,
    ) -> NativeExperts:
        """See ExpertsRuntime; with memory for `room` of the experts, where others are computed elsewhere.

        Raises: ValueError for a size that is not a multiple of 32; MemoryError.
        """
        shape = ExpertsShape(hidden_size, moe_intermediate_size, n_routed_experts, num_experts_per_tok)
        layer = NativeExperts(shape, self._runtime, room)
        if not layer.bound:
            warn_unbound()
        return layer

    def measure_read_gbps(self, seconds: float = 0.1) -> float:
        """See ExpertsRuntime."""
        return float(self._runtime.measure_read_gbps(seconds, probe_bytes(self._runtime.threads)))

    def measure_peak_gops(self, seconds: float = 0.1) -> float:
        """Return how many 10^9 multiplications and additions per second the kernels' instructions alone can do.

        The limit of a large batch: of all threads together, for the numerics of this runtime.
        """
        return float(self._runtime.measure_peak_gops(seconds))

    @property
    def tuning(self) -> Tuning:
        """How calls that start from now on are arranged; results do not depend on it."""
        return Tuning(*self._runtime.tuning)

    @tuning.setter
    def tuning(self, tuning: Tuning) -> None:
        self._runtime.tuning = astuple(tuning)

    def measure_tuning(self, seconds: float = 0.1) -> Tuning:
        """Return the arrangement that is fastest on this machine now.

        Memory: some hundred MiB meanwhile; clearing them takes as long again.
        Raises: MemoryBudgetError if there is too little.
        """
        return Tuning(*self._runtime.measure_tuning(seconds, probe_bytes(self._runtime.threads)))

    def tune(self) -> None:
        """See ExpertsRuntime; by what an earlier start measured, or by measuring it now."""
        key = machine_key(self.isa, self._runtime.numerics, self._runtime.threads, self._runtime.nodes)
        try:
            self.tuning = remembered_tuning(key, self.measure_tuning)
        except (MemoryBudgetError, MemoryError) as error:
            log.info("the kernels are not tuned to this machine: %s", error)

    def close(self) -> None:
        """See ExpertsRuntime."""
        self._runtime.close()

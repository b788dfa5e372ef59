"""Load the experts that the accelerator holds, and make the set of them that follows their use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from hybrid_k2.accelerator import HotExperts, TwinHotExperts
from hybrid_k2.accelerator.gpu_matrix import check_kernels
from hybrid_k2.accelerator.hot_cuda import CudaHotExperts, HotMemory
from hybrid_k2.checkpoint import Checkpoint, StoredExpert
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import HardwareError
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.experts.base import ExpertsShape
from hybrid_k2.experts.cpu import NativeExperts, NativeRuntime
from hybrid_k2.experts.l32 import L32Expert
from hybrid_k2.experts.usage import LayerUsage
from hybrid_k2.model.devices import torch_device
from hybrid_k2.model.expert_loading import INT4, load_experts, make_layer
from hybrid_k2.model.hot_set import HotLayer, HotSet
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.room import room_for
from hybrid_k2.placement import Plan
from hybrid_k2.placement.memories import HOST, TWIN
from hybrid_k2.placement.plan import PlanRow

Count = Callable[[int], None]  # bytes that were read


class HotLoader:
    """Load hot experts layer by layer, as the plan says.

    Raises: HardwareError without the native kernels, or on a GPU without triton.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        plan: Plan,
        runtimes: Mapping[str, ExpertsRuntime],
        undo: ExitStack,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._plan = plan
        self._undo = undo
        self._rows = {layer: row for layer in config.moe_layers if (row := plan.hot_row(layer)) is not None}
        self._shape = ExpertsShape(
            config.hidden_size, config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok
        )
        self._memory: HotMemory | None = None
        if not self._rows:
            return
        row = next(iter(self._rows.values()))
        if row.device != TWIN:
            check_kernels("hottest", row.device)
        runtime = runtimes[TWIN if row.device == TWIN else HOST]
        if not isinstance(runtime, NativeRuntime):
            raise HardwareError(
                f"hottest on {row.device}: expected the native kernels, got none",
                hint="install g++ 11 or newer and reinstall hybrid-k2, or leave the rule out",
            )
        self._runtime = runtime

    def on_host(self, layer: int) -> list[int]:
        """List the experts of a layer that the host holds."""
        row = self._rows.get(layer)
        moved = self._plan.hot_experts(layer) if row is not None and not row.also_on_host else ()
        return [expert for expert in range(self._config.n_routed_experts) if expert not in moved]

    def load(self, layer: int, router: torch.device, count: Count) -> HotExperts | None:
        """Load the hot experts of a layer; `count` gets the bytes of those that nothing else loads."""
        row = self._rows.get(layer)
        if row is None:
            return None
        counted = _ignore if row.also_on_host else count
        if row.device == TWIN:
            return self._load_twin(layer, counted)
        return self._load_cuda(layer, row, router, counted)

    def hot_set(self, moe: Mapping[int, Moe]) -> HotSet | None:
        """Return what keeps the set of hot experts up to date; None where there are none."""
        layers = {
            layer: HotLayer(part.hot, part.experts, part.usage, self._rows[layer].also_on_host)
            for layer, part in moe.items()
            if part.hot is not None and part.usage is not None and isinstance(part.experts, NativeExperts)
        }
        if not layers:
            return None
        hot_set = HotSet(layers)
        self._undo.callback(hot_set.close)
        return hot_set

    def usage(self, layer: int, router: torch.device) -> LayerUsage:
        """Return a counter that goes on from what the plan knows."""
        return LayerUsage(self._plan.usage.get(layer, [0] * self._config.n_routed_experts), router)

    def _load_twin(self, layer: int, count: Count) -> HotExperts:
        experts = self._plan.hot_experts(layer)
        backend = make_layer(self._runtime, self._config, layer, len(experts))
        assert isinstance(backend, NativeExperts)
        self._undo.callback(backend.close)
        load_experts(
            backend,
            self._checkpoint,
            self._config,
            layer,
            experts,
            dtype=INT4,
            threads=self._plan.twin_threads,
            count=count,
        )
        return TwinHotExperts(backend, experts)

    def _load_cuda(self, layer: int, row: PlanRow, router: torch.device, count: Count) -> HotExperts:
        if self._memory is None:
            places = sum(len(self._plan.hot_experts(each)) for each in self._rows)
            with room_for(f"{places} hottest experts", row.device):
                self._memory = HotMemory(self._shape, places, torch_device(row.device))
        packer = self._runtime.make_layer(self._shape.hidden_size, self._shape.moe_intermediate_size, 1, 1)
        weights: dict[int, L32Expert] = {}
        for expert in self._plan.hot_experts(layer):
            stored = StoredExpert(self._checkpoint, self._config, layer, expert)
            packer.load_stored(0, stored)
            weights[expert] = packer.copy_expert(0)
            count(stored.nbytes)
        packer.close()
        return CudaHotExperts(self._memory, weights, router)


def _ignore(nbytes: int) -> None:
    """Count nothing: what is read twice is counted once."""

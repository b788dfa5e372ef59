"""Make what streams the experts of a prompt to the accelerator, and find out what decides which ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np

from hybrid_k2.accelerator.gpu_matrix import check_kernels
from hybrid_k2.accelerator.pinning import PinnedMemory
from hybrid_k2.accelerator.stream import PLACES, ExpertStream, TwinExpertStream
from hybrid_k2.accelerator.stream_cuda import CudaExpertStream
from hybrid_k2.errors import HardwareError
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.experts.cpu import NativeExperts, NativeRuntime
from hybrid_k2.experts.remembered import cache_folder, recall, remember
from hybrid_k2.experts.tuning import file_name, machine_key
from hybrid_k2.model.devices import torch_device
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.prefill_split import PrefillSplit, SplitCosts
from hybrid_k2.model.room import room_for
from hybrid_k2.placement import Plan
from hybrid_k2.placement.groups import expert_parameters, weight_bytes
from hybrid_k2.placement.memories import HOST, TWIN

COPIES = 8  # that are timed
COPY_S = 60.0  # no copy of an expert takes as long


def make_split(
    plan: Plan,
    layers: Mapping[int, Moe],
    runtimes: Mapping[str, ExpertsRuntime],
    undo: ExitStack,
) -> PrefillSplit | None:
    """Return what streams experts, as the plan says; None where it says that none are.

    Effects: on a GPU, begins to pin the experts' memory.
    Raises: HardwareError without native kernels, or on a GPU without triton; MemoryBudgetError.
    """
    if plan.stream == "off":
        return None
    device = plan.accelerator or ""
    if device != TWIN:
        check_kernels("prefill: stream", device)
    host = runtimes[HOST]
    sources = {i: moe.experts for i, moe in layers.items() if isinstance(moe.experts, NativeExperts)}
    usage = {i: moe.usage for i, moe in layers.items() if moe.usage is not None}
    if not isinstance(host, NativeRuntime) or len(sources) != len(layers):
        raise HardwareError(
            f"prefill: stream: auto with {device}: expected the native kernels, got none",
            hint="install g++ 11 or newer and reinstall hybrid-k2, or write stream: off",
        )
    every = range(plan.config.n_routed_experts)
    held = [i for i, part in sources.items() if any(part.holds(expert) for expert in every)]
    if not held:
        return None  # all experts are hot ones
    stream = _make_stream(device, sources, runtimes)
    undo.callback(stream.close)
    if device != TWIN:
        stream.pinned = PinnedMemory(part for source in sources.values() for part in source.memory())
    return PrefillSplit(stream, find_costs(plan, host, stream, held[0]), usage)


def _make_stream(
    device: str, sources: Mapping[int, NativeExperts], runtimes: Mapping[str, ExpertsRuntime]
) -> ExpertStream:
    shape = next(iter(sources.values())).shape
    sizes = (shape.hidden_size, shape.moe_intermediate_size)
    with room_for(f"prefill: stream: {PLACES} experts", device):
        if device == TWIN:
            places = runtimes[TWIN].make_layer(*sizes, PLACES, shape.num_experts_per_tok)
            assert isinstance(places, NativeExperts)
            return TwinExpertStream(sources, places, COPY_S)
        return CudaExpertStream(sources, shape, torch_device(device), COPY_S)


def find_costs(plan: Plan, host: NativeRuntime, stream: ExpertStream, layer: int) -> SplitCosts:
    """Return the costs that the rules state, and for others those that an earlier start measured, or measure them.

    Effects: what is measured is remembered, so that a prompt is split alike at each start, with the same results.
    """
    rule, nbytes = plan.rules.prefill, weight_bytes(expert_parameters(plan.config), "int4")
    stated = {"copy": rule.copy_gbps, "read": rule.read_gbps, "token": rule.token_us}
    costs = {name: value for name, value in stated.items() if value is not None}
    if len(costs) < len(stated):
        key = f"{machine_key(host.isa, plan.numerics, plan.threads, len(plan.nodes))}, {plan.accelerator}, {nbytes} B"
        costs = _remembered(key, lambda: _measure(host, stream, layer, nbytes)) | costs
    # 10^9 bytes per second are 10^3 bytes per us.
    return SplitCosts(nbytes / (costs["copy"] * 1e3), nbytes / (costs["read"] * 1e3), costs["token"])


def _remembered(key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    file = cache_folder() / f"split-{file_name(key)}.json"
    costs: Any = (recall(file, key) or {}).get("costs")
    if _are_costs(costs):
        return dict(costs)
    measured = measure()
    remember(file, key, {"costs": measured})
    return measured


def _measure(host: NativeRuntime, stream: ExpertStream, layer: int, nbytes: int) -> dict[str, float]:
    """Measure GB/s of copies, GB/s of the host's reads, and us of a token. Raises: MemoryBudgetError."""
    read = host.measure_read_gbps()
    return {
        "copy": nbytes / median(_copy_seconds(stream, layer)) / 1e9,
        "read": read,
        "token": host.tuning.token_cost * nbytes / (read * 1e3),
    }


def _copy_seconds(stream: ExpertStream, layer: int) -> list[float]:
    held, seconds = stream.on_host(layer), []
    for number in range(COPIES):
        stream.begin()
        start = time.perf_counter()
        stream.wait_for(stream.ask(layer, [held[number % len(held)]]))
        seconds.append(time.perf_counter() - start)
    stream.begin()
    return seconds


def _are_costs(values: object) -> bool:
    return (
        isinstance(values, dict)
        and values.keys() == {"copy", "read", "token"}
        and all(isinstance(value, float) and np.isfinite(value) and value > 0 for value in values.values())
    )

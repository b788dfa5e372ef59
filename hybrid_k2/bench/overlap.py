"""Decode steps of a slice of a model on an accelerator, with and without two halves that take turns.

Steps with and without overlap alternate, so that a busy neighbour meets both; if that is wanted, so do steps that are
launched as one graph. The times of both sides come from the trace of the steps with overlap, whose operations are
launched one by one; the hand-off's from batches that nothing runs beside.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hybrid_k2.accelerator import Trace, check_trace_file
from hybrid_k2.bench.slice import CONTEXT, slice_config, widths, write_slice
from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import ConfigError, HardwareError, MemoryBudgetError
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.decode_graphs import DecodeGraphs
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.loader import load_text_model
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.text import TextModel
from hybrid_k2.placement import Machine, Plan, Rules, make_plan, shipped_rules
from hybrid_k2.placement.draft import PAGE_TOKENS
from hybrid_k2.placement.form import PlaceRule
from hybrid_k2.placement.memories import TWIN
from hybrid_k2.placement.overheads import GRAPH_ROWS

WARM_STEPS = 2
HANDOFFS = 100


@dataclass(frozen=True)
class OverlapReport:
    """What the steps took. Units: ms, us; medians over steps.

    A layer's times are of one MoE layer and all its halves: what each side worked, and the step's part. `overlap_share`
    is the part of the experts' time in which the accelerator worked, too; None where it is not known when they did.
    `hot_hit_rates`: per MoE layer, which part of the choices of experts were hot ones; empty without hot experts.
    `step_graph_ms`: a step with overlap that is launched as a graph; None where that was not measured.
    """

    device: str
    accelerator: str
    experts: str
    sequences: int
    context: int
    moe_layers: int
    accelerator_threads: int
    experts_threads: int
    steps: int
    overlap_share: float | None
    step_ms: float
    step_off_ms: float
    step_graph_ms: float | None
    layer_ms: float
    layer_accelerator_ms: float
    layer_experts_ms: float
    handoff_us: float | None
    deferred: int
    hot_experts: int
    hot_hit_rates: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `--json`."""
        return asdict(self)

    def table(self) -> str:
        """Write the report as text."""
        share = "not known" if self.overlap_share is None else f"{self.overlap_share:.0%}"
        handoff = "not known" if self.handoff_us is None else f"{self.handoff_us:.0f} us"
        rates = ", ".join(f"{layer}: {rate:.0%}" for layer, rate in self.hot_hit_rates.items())
        graph = "" if self.step_graph_ms is None else f"; {self.step_graph_ms:.2f} ms as a graph"
        late = (f"deferred         {self.deferred} experts of each token",) if self.deferred else ()
        hot = (f"hot experts      {self.hot_experts} of each layer; hits by layer {rates}",) if rates else ()
        return "\n".join(
            (
                f"{self.accelerator} (threads of the host: {self.accelerator_threads}), experts: {self.experts} "
                f"(threads: {self.experts_threads})",
                f"{self.sequences} sequences behind {self.context} tokens, {self.moe_layers} MoE layers, "
                f"{self.steps} steps",
                f"overlap share    {share}",
                f"step             {self.step_ms:.2f} ms; {self.step_off_ms:.2f} ms without overlap{graph}",
                f"MoE layer        {self.layer_ms:.2f} ms: accelerator {self.layer_accelerator_ms:.2f} ms, "
                f"experts {self.layer_experts_ms:.2f} ms",
                f"hand-off         {handoff} there and back",
                *late,
                *hot,
            )
        )


def measure_overlap(
    device: str,
    sequences: int,
    *,
    scale: int = 4,
    layers: int = 7,
    experts: int = 16,
    context: int = 256,
    steps: int = 12,
    hot: int = 0,
    graphs: bool = False,
    deferred: int = 0,
    seed: int = 0,
    trace_to: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> OverlapReport:
    """Measure decode steps of `sequences` sequences behind `context` tokens each, on "twin" or "cuda".

    `scale` divides the widths of K2.6. `hot` experts of each layer are the device's, `deferred` ones of each
    token act one layer late. `graphs`: measure steps that are launched as a graph, too. `trace_to` gets the trace of
    the steps with overlap.
    Memory and disk: the slice once each, in a temporary folder until it is loaded.
    Raises: HardwareError for a GPU that is not there, or no room on the disk; MemoryBudgetError for a slice that does
    not fit; ConfigError for more tokens than a cache holds, a trace that cannot be written, or no graphs to measure.
    """
    tokens = check_tokens(sequences, context, steps)
    if trace_to is not None:
        check_trace_file(trace_to)
    config = slice_config(widths(scale), layers, experts, "bench overlap")
    torch.manual_seed(seed)
    total = steps + WARM_STEPS
    with _loaded(_make_rules(device, tokens, hot, deferred), config, progress) as (plan, model):
        decoding = _Decoding(model, LatentCache(plan.kv_cache, config), sequences, context, total)
        launches_graphs, model.graphs = model.graphs, None
        if graphs:
            _check_graphs(launches_graphs, sequences)
        trace, on, off, as_graph = Trace(), [], [], []
        for number in range(total):
            progress(f"step {number + 1} of {total}")
            if number == WARM_STEPS:
                _take_hit_rates(model)  # of what came before
            off.append(decoding.step(number, ping_pong=False, trace=None))
            on.append(decoding.step(number, ping_pong=True, trace=trace if number >= WARM_STEPS else None))
            if graphs:
                model.graphs = launches_graphs
                as_graph.append(decoding.step(number, ping_pong=True, trace=None))
                model.graphs = None
        moe_layers = [index for index, layer in enumerate(model.layers) if isinstance(layer.mlp, Moe)]
        report = OverlapReport(
            device=device,
            accelerator=model.accelerator.name,
            experts=model.experts_runtime.name,
            sequences=sequences,
            context=context,
            moe_layers=len(moe_layers),
            accelerator_threads=plan.twin_threads,
            experts_threads=plan.threads,
            steps=steps,
            overlap_share=trace.overlap_share(),
            step_ms=median(on[WARM_STEPS:]) * 1e3,
            step_off_ms=median(off[WARM_STEPS:]) * 1e3,
            step_graph_ms=median(as_graph[WARM_STEPS:]) * 1e3 if graphs else None,
            layer_ms=median(on[WARM_STEPS:]) * 1e3 / layers,
            layer_accelerator_ms=_busy_ms(trace, "accelerator", moe_layers) / steps / len(moe_layers),
            layer_experts_ms=_busy_ms(trace, "experts", moe_layers) / steps / len(moe_layers),
            handoff_us=_handoff_us(model, moe_layers[0], max(1, sequences // 2)) if device == TWIN else None,
            deferred=deferred,
            hot_experts=hot,
            hot_hit_rates=_take_hit_rates(model) if hot else {},
        )
    if trace_to is not None:
        trace.write(trace_to)
    return report


def check_tokens(sequences: int, context: int, steps: int) -> int:
    """Return the tokens of the cache that such a measurement needs: whole pages for each sequence.

    Raises: ConfigError for more than a cache may hold.
    """
    of_each = -(-(context + steps + WARM_STEPS) // PAGE_TOKENS) * PAGE_TOKENS
    if sequences * of_each > CONTEXT:
        raise ConfigError(
            f"bench overlap: expected at most {CONTEXT} cached tokens, got {sequences * of_each}: {of_each} of each of "
            f"the {sequences} sequences",
            hint="ask for fewer sequences, or for less context or fewer steps",
        )
    return sequences * of_each


def _check_graphs(graphs: DecodeGraphs | None, sequences: int) -> None:
    if graphs is None or sequences > GRAPH_ROWS[-1]:
        got = f"{sequences} sequences" if graphs is not None else "a device or an installation that launches none"
        raise ConfigError(
            f"bench overlap: graphs: expected a GPU, triton and at most {GRAPH_ROWS[-1]} sequences, got {got}",
            hint="leave --graphs out, or: --device cuda, and pip install 'hybrid-k2[gpu]'",
        )


def _make_rules(device: str, tokens: int, hot: int, deferred: int) -> Rules:
    """Return the shipped rules for the twin or the first GPU, with overlap, a cache of this size, and these experts."""
    rules = shipped_rules(TWIN if device == TWIN else "gpu")
    place, kv_cache = rules.place, replace(rules.kv_cache, tokens=tokens)
    if hot:
        place += (PlaceRule("routed_experts", None, "gpu", "int4", place[-1].line, len(place) + 1, hot),)
    return replace(
        rules, place=place, overlap="ping_pong", deferred=deferred, kv_cache=kv_cache, source="bench overlap"
    )


def _take_hit_rates(model: TextModel) -> dict[int, float]:
    """Return the part of the choices since the last call that were hot experts, by layer."""
    return {layer: usage.take_hit_rate() or 0.0 for layer, usage in model.usage.items()}


@contextmanager
def _loaded(rules: Rules, config: ModelConfig, progress: Callable[[str], None]) -> Iterator[tuple[Plan, TextModel]]:
    machine = Machine.probe()
    if rules.devices.gpu != TWIN and not machine.gpus:
        note = f" ({machine.gpu_note})" if machine.gpu_note else ""
        raise HardwareError(
            f"bench overlap: expected a CUDA device, got none{note}",
            hint="--device twin measures the same with a thread of the host in the place of a GPU",
        )
    try:
        plan = make_plan(rules, config, machine)
    except MemoryBudgetError as error:
        hint = "ask for fewer --layers, --experts, --sequences or less --context, or for a larger --scale"
        raise MemoryBudgetError(error.message, hint=hint) from error
    with _temporary_folder() as name:
        folder = Path(name)
        progress(f"writing {config.num_hidden_layers} layers of random weights to {folder}")
        write_slice(folder, config)
        with Checkpoint.open(folder) as checkpoint:
            model = load_text_model(checkpoint, config, plan)
    try:
        yield plan, model
    finally:
        model.close()


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise HardwareError(
            f"bench overlap: expected a folder for temporary files, got: {error.strerror}",
            hint="point TMPDIR at a folder with room",
        ) from error


class _Decoding:
    """Sequences behind random latents, of which each step decodes one token."""

    def __init__(self, model: TextModel, cache: LatentCache, sequences: int, context: int, steps: int) -> None:
        self.model = model
        self.cache = cache
        self.context = context
        self.pages = [cache.pool.allocate(cache.pages_for(context + steps)) for _ in range(sequences)]
        for layer in cache.layers:
            layer.normal_()

    def step(self, number: int, *, ping_pong: bool, trace: Trace | None) -> float:
        """Return the seconds of a step."""
        chunks = [Chunk([(7 * number + i) % 4096], self.context + number, own) for i, own in enumerate(self.pages)]
        self.model.ping_pong, self.model.trace = ping_pong, trace
        batch = Batch.build(chunks)
        start = time.perf_counter()
        self.model.forward(batch, self.cache).sum().item()  # waits for a GPU, too
        return time.perf_counter() - start


def _busy_ms(trace: Trace, lane: str, layers: Sequence[int]) -> float:
    """Sum the time in which a lane worked for these layers."""
    part = Trace()
    part.events = [event for event in trace.events if event.label.layer in layers]
    return sum(stop - start for start, stop in part.busy(lane)) / 1e6


def _handoff_us(model: TextModel, layer: int, tokens: int) -> float:
    """Return the median time from `post` to the end of `take`, less what the experts computed meanwhile."""
    hidden = torch.randn(tokens, model.config.hidden_size)
    experts, k = model.config.n_routed_experts, model.config.num_experts_per_tok
    ids = torch.rand(tokens, experts).topk(k).indices.int()
    moe = model.layers[layer].mlp
    if isinstance(moe, Moe) and moe.hot is not None:
        ids = moe.hot.elsewhere(ids)
    model.trace = trace = Trace()
    seconds = []
    for _ in range(HANDOFFS):
        trace.events.clear()
        start = time.monotonic_ns()
        model.handoff.post(0, layer, hidden, ids, torch.ones(tokens, k))
        model.handoff.take(0, layer)
        whole = time.monotonic_ns() - start
        seconds.append(whole - sum(stop - start for start, stop in trace.busy("experts")))
    return median(seconds) / 1e3

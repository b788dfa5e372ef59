"""The plan: where every tensor lives, decided before anything is loaded. The loader obeys it and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hybrid_k2.config import ModelConfig
from hybrid_k2.host.threads import NodeThreads
from hybrid_k2.placement.claims import ranges_of
from hybrid_k2.placement.form import Rules, format_layers
from hybrid_k2.placement.groups import LAYERED_GROUPS, decoded_bytes
from hybrid_k2.placement.hot import Usage
from hybrid_k2.placement.machine import Machine
from hybrid_k2.placement.memories import HOST, memory_of
from hybrid_k2.placement.overheads import SEQUENCES, Overhead
from hybrid_k2.placement.sizes import format_bytes
from hybrid_k2.placement.table import format_table


@dataclass(frozen=True)
class Placement:
    """Say where a tensor group lives ("host", "twin", "cuda:N") and in which dtype ("bf16", "fp32", "int8", "int4")."""

    device: str
    dtype: str

    @property
    def memory(self) -> str:
        """Return the device whose memory holds it: the twin's is the host's."""
        return memory_of(self.device)


@dataclass(frozen=True)
class KvCachePlan:
    """Size the paged latent KV cache. tokens: the longest context; nbytes: of whole pages, over all layers."""

    device: str
    dtype: str
    tokens: int
    page_tokens: int
    nbytes: int

    @property
    def pages(self) -> int:
        """Return the pages that hold `tokens`."""
        return -(-self.tokens // self.page_tokens)


@dataclass(frozen=True, repr=False)
class PlanRow:
    """Place one group, or some layers of it.

    layers: None for a group outside the layers. line: of its rule, 0 where no rule names it. hottest: the row holds so
    many of the most used experts of each layer, `experts` to begin with; 0: the group, less what such rows take from
    it. also_on_host: the group holds these experts, too.
    """

    what: str
    layers: tuple[int, ...] | None
    device: str
    dtype: str
    nbytes: int
    line: int
    hottest: int = 0
    experts: tuple[tuple[int, ...], ...] = ()
    also_on_host: bool = False

    @property
    def name(self) -> str:
        """Name the group, or the part of it."""
        return f"{self.hottest} hottest expert{'s' * (self.hottest > 1)}" if self.hottest else self.what

    @property
    def layer_text(self) -> str:
        """Write the layers as rules do; empty for a group outside the layers."""
        return "" if self.layers is None else format_layers(ranges_of(self.layers))

    def __repr__(self) -> str:
        layers = f" {self.layer_text}" if self.layers else ""
        return f"PlanRow({self.name}{layers} on {self.device}, {self.dtype}, {format_bytes(self.nbytes)})"


@dataclass(frozen=True, repr=False)
class Plan:
    """Say for every tensor group of a model where it lives, in which dtype and how large it is.

    numerics: "exact", "fast" or "bf16" (native INT4 kernels), or "reference" (the readable FP32 experts).
    nodes: the experts' threads by NUMA node; each node holds a slice of the routed experts.
    accelerator: what computes beside the experts, "cuda:N" or "twin"; None: the host computes everything.
    overlap: "off", or "ping_pong": two half batches take turns between accelerator and experts.
    deferred: so many of each token's experts are added one layer late.
    twin_threads: the host's threads that compute what is on the twin; 0 without one.
    activation_dtype: of the residual stream. chunk_tokens: prompt tokens per forward pass.
    stream: "auto": a GPU computes heavy experts of a prompt, brought over as they are needed; or "off".
    graphs: decode steps of a GPU are recorded where they can be, and launched as one.
    overheads: what a GPU takes beside weights and KV cache, and what the host does for it.
    self_check: compare what is computed with a reference before it serves; where there is an accelerator.
    usage: how often each expert of each MoE layer was chosen, as far as that is known: what `hottest` goes by.
    notes: what the user should know.
    """

    config: ModelConfig
    rules: Rules
    machine: Machine
    kv_cache: KvCachePlan
    numerics: str
    nodes: tuple[NodeThreads, ...]
    activation_dtype: str
    chunk_tokens: int
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()
    accelerator: str | None = None
    overlap: str = "off"
    deferred: int = 0
    twin_threads: int = 0
    stream: str = "off"
    graphs: bool = False
    overheads: tuple[Overhead, ...] = ()
    self_check: bool = False
    usage: Usage = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Count the experts' threads, over all nodes."""
        return sum(node.threads for node in self.nodes)

    def where(self, what: str, layer: int | None = None) -> Placement:
        """Find the placement of a group, in one layer if it has layers; of the routed experts that of most of them.

        Raises: KeyError: no such group.
        """
        for row in self.rows:
            if row.what == what and not row.hottest and (layer is None if row.layers is None else layer in row.layers):
                return Placement(row.device, row.dtype)
        raise KeyError(f"{what}, layer {layer}")

    def holds_stream(self, device: str) -> bool:
        """Say whether a device holds attention and router of all layers: what experts read and give passes there."""
        return all(row.device == device for row in self.rows if row.what in ("attention", "router"))

    @property
    def batch_tokens(self) -> int:
        """Return the tokens of one forward pass at most: a chunk of a prompt, or a step of all sequences."""
        return max(self.chunk_tokens, SEQUENCES)

    @property
    def devices(self) -> tuple[str, ...]:
        """List the devices whose memory is in use, the host last."""
        used = {row.device for row in self.rows} | {self.kv_cache.device} | {one.device for one in self.overheads}
        return tuple(sorted({memory_of(device) for device in used}, key=lambda device: (device == HOST, device)))

    def bytes_on(self, device: str) -> int:
        """Sum weights, KV cache and overheads in the memory of a device."""
        return sum(nbytes for nbytes, _ in self.items_on(device))

    def items_on(self, device: str) -> tuple[tuple[int, str], ...]:
        """List what stands in the memory of a device, as (bytes, description with the line of its rule)."""
        return tuple(_items(self, device))

    @property
    def expert_bytes(self) -> int:
        """Sum the routed experts in host memory."""
        return expert_bytes(self.rows)

    @property
    def bytes_per_token(self) -> int:
        """Sum the weights that decoding one token reads: dense groups, the chosen experts, one embedding row."""
        return bytes_per_token(self.config, self.rows)

    def bytes_per_token_on(self, device: str) -> int:
        """Sum those of them in the memory of a device; all routed experts count where the ones that are not hot lie."""
        return bytes_per_token(self.config, tuple(row for row in self.rows if memory_of(row.device) == device))

    def hot_row(self, layer: int) -> PlanRow | None:
        """Find the row of the hot experts of a layer; None where it has none."""
        return next((row for row in self.rows if row.hottest and layer in (row.layers or ())), None)

    def hot_experts(self, layer: int) -> tuple[int, ...]:
        """List the routed experts of a layer that the accelerator holds to begin with."""
        row = self.hot_row(layer)
        return row.experts[(row.layers or ()).index(layer)] if row is not None else ()

    def table(self) -> str:
        """Write the plan as aligned text."""
        return format_table(self)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{device} {format_bytes(self.bytes_on(device))}" for device in self.devices)
        return f"Plan({self.rules.source!r}, {self.config.model_type}, {sizes}, numerics={self.numerics!r})"


def bytes_per_token(config: ModelConfig, rows: tuple[PlanRow, ...]) -> int:
    """Sum the weights that decoding one token reads."""
    placed = (row for row in rows if not row.hottest)
    return sum(len(row.layers or (0,)) * decoded_bytes(config, row.what, row.dtype) for row in placed)


def expert_bytes(rows: tuple[PlanRow, ...]) -> int:
    """Sum the routed experts in host memory."""
    return sum(row.nbytes for row in rows if row.what == "routed_experts" and row.device == HOST)


def _items(plan: Plan, device: str) -> Iterator[tuple[int, str]]:
    for row in plan.rows:
        if memory_of(row.device) == device:
            layers = f" of layers {row.layer_text}" if row.what in LAYERED_GROUPS else ""
            place = f" (line {row.line})" if row.line else ""
            yield row.nbytes, f"{row.name}{layers}{place}"
    cache = plan.kv_cache
    if memory_of(cache.device) == device:
        place = f" (line {plan.rules.kv_cache.line})" if plan.rules.kv_cache.line else ""
        yield cache.nbytes, f"kv_cache of {cache.tokens} tokens{place}"
    yield from ((one.nbytes, one.what) for one in plan.overheads if memory_of(one.device) == device)

"""The form of a rule file once it is read: frozen statements, each with the line it stands on."""

from __future__ import annotations

from dataclasses import dataclass

FORM_VERSION = 1


@dataclass(frozen=True)
class Devices:
    """Name the devices that rules may use, and how much of the host they may take.

    gpu: "cuda:N"; "twin" for a thread of the host in a GPU's place; None when the file names none.
    gpu_memory_bytes: the size of the card; None: what it has.
    host_memory_bytes, host_threads, twin_threads: None means auto, decided by the machine.
    host_numa: "auto", "off", or a number of virtual nodes.
    """

    gpu: str | None = None
    host_memory_bytes: int | None = None
    host_threads: int | None = None
    host_numa: str | int = "auto"
    gpu_memory_bytes: int | None = None
    twin_threads: int | None = None
    gpu_line: int | None = None
    gpu_memory_line: int | None = None
    twin_threads_line: int | None = None
    host_memory_line: int | None = None


@dataclass(frozen=True)
class PlaceRule:
    """Place one tensor group, or some layers of it.

    layers: None for all layers of the group; ranges stay ranges until the model bounds them.
    on: "gpu" or "host". dtype: None means as stored (the router on a GPU: fp32).
    hottest: place so many of the most used routed experts of each layer; 0: as many as fit; None: the whole group.
    also_on_host: keep them in host memory, too.
    line: of the rule. number: its place in the list, from 1. Both are 0 for a group that no rule names.
    """

    what: str
    layers: tuple[range, ...] | None
    on: str
    dtype: str | None
    line: int
    number: int
    hottest: int | None = None
    also_on_host: bool = False

    def __str__(self) -> str:
        layers = "" if self.layers is None else f", layers {format_layers(self.layers)}"
        return f"place rule {self.number} ({self.what}{layers})"


@dataclass(frozen=True)
class KvCacheRule:
    """Place the KV cache. on: None follows attention. tokens: None means auto."""

    on: str | None = None
    dtype: str = "bf16"
    tokens: int | None = None
    line: int | None = None
    tokens_line: int | None = None


@dataclass(frozen=True)
class PrefillRule:
    """Say how a prompt is read. chunk_tokens: None means auto.

    stream: "auto" computes heavy experts on the GPU, brought over as they are needed; "off" none.
    copy_gbps, read_gbps, token_us: what decides which ones are heavy, in 10^9 bytes per second that reach the GPU and
    that the host's kernels read, and in microseconds of the host for a token of one expert. None: measured.
    """

    chunk_tokens: int | None = None
    stream: str = "off"
    stream_line: int | None = None
    copy_gbps: float | None = None
    read_gbps: float | None = None
    token_us: float | None = None


@dataclass(frozen=True, repr=False)
class Rules:
    """Hold one rule file, checked for form; `make_plan` checks it against a model and a machine.

    deferred: so many of each token's experts are added one layer late. graphs: record the decode steps of a GPU, and
    launch each as one. self_check: compare an accelerator with a reference before it serves.
    source: the file as named in errors. reason: why it was chosen, when the machine chose it.
    """

    place: tuple[PlaceRule, ...]
    source: str
    devices: Devices = Devices()
    kv_cache: KvCacheRule = KvCacheRule()
    numerics: str = "exact"
    overlap: str = "auto"
    overlap_line: int | None = None
    deferred: int = 0
    prefill: PrefillRule = PrefillRule()
    graphs: bool = True
    self_check: bool = True
    version: int = FORM_VERSION
    reason: str = ""

    def __repr__(self) -> str:
        return f"Rules({self.source!r}, {len(self.place)} place rules, numerics={self.numerics!r})"


def format_layers(layers: tuple[range, ...]) -> str:
    """Write layers as rules do: `3`, `1..60`, `0,2..5`."""
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}..{part[-1]}" for part in layers)

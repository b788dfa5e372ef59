"""Reads a rule file into `Rules`: the whole form is known here, and what this version lacks is refused by name."""

from __future__ import annotations

import re
from dataclasses import replace

from hybrid_k2.placement.form import FORM_VERSION, Devices, KvCacheRule, PlaceRule, PrefillRule, Rules
from hybrid_k2.placement.groups import GROUPS, INT8_GROUPS, LAYERED_GROUPS
from hybrid_k2.placement.memories import TWIN
from hybrid_k2.placement.section import HOTTEST, Section, describe
from hybrid_k2.placement.yaml_tree import Mapping, Node, Scalar, Sequence, parse_yaml

DENSE_DTYPES = ("bf16", "fp32")
EXPERT_DTYPES = ("int4", "bf16", "fp32")
LATER_DTYPES = ("int8", "fp8")
MAX_TOKENS = 1_000_000_000  # bounds what is read; the plan checks the limit of the model
MAX_THREADS = 4096
MAX_NODES = 64
MAX_EXPERTS = 65536


def parse_rules(text: str, source: str = "rules") -> Rules:
    """Read rules from YAML text and check their form; `source` names the text in errors.

    Raises: RulesError.
    """
    keys = ("version", "devices", "place", "kv_cache", "numerics", "overlap", "prefill", "graphs", "self_check")
    top = Section(source, "", parse_yaml(text, source), keys)
    _check_version(top)
    devices = _devices(top)
    overlap, deferred = _overlap(top)
    return Rules(
        place=_place(top, devices),
        source=source,
        devices=devices,
        kv_cache=_kv_cache(top, devices),
        numerics=top.choice("numerics", ("exact", "fast", "bf16", "reference"), default="exact"),
        overlap=overlap,
        overlap_line=top.line_of("overlap"),
        deferred=deferred,
        prefill=_prefill(top),
        graphs=top.choice("graphs", ("auto", "off"), default="auto") == "auto",
        self_check=top.choice("self_check", ("on", "off"), default="on") == "on",
    )


def _check_version(top: Section) -> None:
    version = top.choice("version", (str(FORM_VERSION),), default="")
    if not version:
        top.fail("version", f"expected version: {FORM_VERSION}, got no version")


def _devices(top: Section) -> Devices:
    node = top.get("devices")
    if node is None:
        return Devices()
    devices = Section(top.source, "devices", node, ("gpu", "gpu_memory", "twin_threads", "host"))
    gpu = devices.text("gpu", "cuda:N or twin")
    if gpu is not None and gpu != TWIN and not re.fullmatch(r"cuda:(0|[1-9][0-9]{0,2})", gpu):
        devices.fail("gpu", f"gpu: expected cuda:N or twin, got {gpu!r}", "cuda:0 is the first GPU")
    twin_threads = devices.count("twin_threads", MAX_THREADS)
    if twin_threads is not None and gpu != TWIN:
        devices.fail("twin_threads", "twin_threads: expected gpu: twin beside it, got " + (gpu or "none"))
    gpu_memory = devices.size("gpu_memory")
    if gpu_memory is not None and (gpu is None or gpu == TWIN):
        devices.fail("gpu_memory", "gpu_memory: expected gpu: cuda:N beside it, got " + (gpu or "none"))
    named = Devices(
        gpu=gpu,
        gpu_memory_bytes=gpu_memory,
        twin_threads=twin_threads,
        gpu_line=devices.line_of("gpu"),
        gpu_memory_line=devices.line_of("gpu_memory"),
        twin_threads_line=devices.line_of("twin_threads"),
    )
    host_node = devices.get("host")
    if host_node is None:
        return named
    host = Section(top.source, "devices.host", host_node, ("memory", "threads", "numa"))
    threads = host.count("threads", MAX_THREADS)
    if threads is not None and twin_threads is not None and twin_threads >= threads:
        expected = f"fewer than all threads of the host ({threads})"
        devices.fail("twin_threads", f"twin_threads: expected {expected}, got {twin_threads}")
    return replace(
        named,
        host_memory_bytes=host.size("memory"),
        host_threads=threads,
        host_numa=_numa(host, threads),
        host_memory_line=host.line_of("memory"),
    )


def _numa(host: Section, threads: int | None) -> str | int:
    expected = f"auto, off, or a number of virtual nodes from 1 to {MAX_NODES}"
    text = host.text("numa", expected) or "auto"
    if text in ("auto", "off"):
        return text
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text) or int(text) > MAX_NODES:
        host.fail("numa", f"numa: expected {expected}, got {text!r}")
    if threads is not None and int(text) > threads:
        host.fail("numa", f"numa: expected at most as many nodes as threads ({threads}), got {text}")
    return int(text)


def _place(top: Section, devices: Devices) -> tuple[PlaceRule, ...]:
    node = top.get("place")
    if node is None:
        top.fail("place", "expected the key place (a list of rules), got none")
    if not isinstance(node, Sequence) or not node.items:
        top.fail("place", f"place: expected a list of rules, got {describe(node)}")
    return tuple(_place_rule(top.source, item, number, devices) for number, item in enumerate(node.items, start=1))


def _place_rule(source: str, node: Node, number: int, devices: Devices) -> PlaceRule:
    section = Section(source, f"place rule {number}", node, ("what", "layers", "on", "dtype", HOTTEST, "also_on_host"))
    what = section.choice("what", GROUPS)
    layers = section.layers("layers")
    if layers is not None and what not in LAYERED_GROUPS:
        section.fail("layers", f"layers: expected no layers for {what} (it stands outside them), got some")
    on = _on(section, devices) or section.choice("on", ("host", "gpu"))
    hottest = _hottest(section, what, on, devices)
    dtype = _dtype(section, what, hottest is not None, on, devices)
    also_on_host = section.choice("also_on_host", ("true", "false"), default="false") == "true"
    return PlaceRule(what, layers, on, dtype, section.line, number, hottest, also_on_host)


def _hottest(section: Section, what: str, on: str, devices: Devices) -> int | None:
    """Read how many routed experts go to the GPU, 0 for auto; None for a rule that is not about some of them."""
    for key in (HOTTEST, "also_on_host"):
        if section.get(key) is not None and (what, on) != ("routed_experts", "gpu"):
            section.fail(key, f"{key}: expected it with routed_experts on: gpu, got {what} on: {on}")
    if (what, on) != ("routed_experts", "gpu"):
        return None
    if section.get(HOTTEST) is None:
        section.unavailable("on", "routed_experts on: gpu", "hottest: N places the most used ones of each layer there")
    count = section.count(HOTTEST, MAX_EXPERTS)
    if count is None and devices.gpu == TWIN:
        section.fail(HOTTEST, f"{HOTTEST}: expected a number (the twin's memory is the host's), got auto")
    return count or 0


def _dtype(section: Section, what: str, hot: bool, on: str, devices: Devices) -> str | None:
    """Read the dtype of a rule; None when the key is absent."""
    node = section.get("dtype")
    if node is None:
        return None
    allowed = _dtypes(what, hot, on_card=on == "gpu" and devices.gpu != TWIN)
    if isinstance(node, Scalar) and node.text not in allowed and node.text in _dtypes(what, hot, on_card=True):
        expected = f"one of {', '.join(allowed)} on the {'twin' if on == 'gpu' else 'host'}"
        section.fail("dtype", f"dtype: expected {expected}, got {node.text!r}, which only a GPU computes")
    return section.choice("dtype", allowed, [later for later in LATER_DTYPES if later not in allowed])


def _dtypes(what: str, hot: bool, on_card: bool) -> tuple[str, ...]:
    """List the dtypes of a group: weight-only ones for its matrices where there are kernels for them."""
    if what == "routed_experts":
        return ("int4",) if hot else EXPERT_DTYPES
    if what not in INT8_GROUPS:
        return DENSE_DTYPES
    return (*DENSE_DTYPES, "int8", "fp8") if on_card else (*DENSE_DTYPES, "int8")


def _on(section: Section, devices: Devices) -> str | None:
    """Read where something stands; None when the key is absent."""
    if section.get("on") is None:
        return None
    on = section.choice("on", ("host", "gpu"))
    if on == "gpu" and devices.gpu is None:
        section.fail("on", "on: expected host (devices names no gpu), got gpu", "add devices: {gpu: cuda:0}")
    return on


def _kv_cache(top: Section, devices: Devices) -> KvCacheRule:
    node = top.get("kv_cache")
    if node is None:
        return KvCacheRule()
    section = Section(top.source, "kv_cache", node, ("on", "dtype", "tokens"))
    return KvCacheRule(
        on=_on(section, devices),
        dtype=section.choice("dtype", DENSE_DTYPES, LATER_DTYPES, default="bf16"),
        tokens=section.count("tokens", MAX_TOKENS),
        line=top.line_of("kv_cache"),
        tokens_line=section.line_of("tokens"),
    )


def _overlap(top: Section) -> tuple[str, int]:
    """Read how both sides take turns, and how many experts are deferred."""
    node = top.get("overlap")
    if not isinstance(node, Mapping):
        return top.choice("overlap", ("auto", "off", "ping_pong"), default="auto"), 0
    section = Section(top.source, "overlap", node, ("mode", "deferred"))
    mode = section.choice("mode", ("auto", "off", "ping_pong"), default="auto")
    return mode, section.whole("deferred", MAX_EXPERTS)


def _prefill(top: Section) -> PrefillRule:
    node = top.get("prefill")
    if node is None:
        return PrefillRule()
    costs = ("copy_gbps", "read_gbps", "token_us")
    section = Section(top.source, "prefill", node, ("stream", "chunk_tokens", *costs))
    stream = section.choice("stream", ("auto", "off"), default="off")
    numbers = [section.number(cost) for cost in costs]
    return PrefillRule(section.count("chunk_tokens", MAX_TOKENS), stream, section.line_of("stream"), *numbers)

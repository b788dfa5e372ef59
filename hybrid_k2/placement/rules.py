"""Placement rules: load a file, find a shipped one, or choose one for the machine."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import RulesError, shown
from hybrid_k2.placement.budget import find_budget
from hybrid_k2.placement.draft import draft_plan
from hybrid_k2.placement.form import Devices, KvCacheRule, PlaceRule, PrefillRule, Rules
from hybrid_k2.placement.machine import Machine
from hybrid_k2.placement.reader import parse_rules
from hybrid_k2.placement.sizes import format_bytes
from hybrid_k2.placement.yaml_tree import read_text

__all__ = [
    "Devices",
    "KvCacheRule",
    "PlaceRule",
    "PrefillRule",
    "Rules",
    "default_rules",
    "load_rules",
    "parse_rules",
    "shipped_names",
    "shipped_rules",
]

# A GPU that holds the dense groups but only a shorter context than this is not worth the choice by default.
_MIN_GPU_TOKENS = 4096
_SHIPPED_NAME = re.compile(r"(?:rules/)?([^/.]+)(?:\.yaml)?")


def load_rules(path: str | Path) -> Rules:
    """Load a rule file; a name that is no file may be that of a shipped one ("host", "host.yaml", "rules/host.yaml").

    A path that says where it starts ("./host") always means a file.
    Raises: RulesError.
    """
    try:
        file = Path(path) if path != "" else None  # as a path, nothing is the folder at hand
    except TypeError:
        file = None
    if file is None:
        raise RulesError(
            f"rules: expected a rule file or the name of a shipped one, got {shown(path)}", hint=_shipped_hint()
        )
    source = str(path)  # as it was written: Path drops a "./"
    if not os.path.isfile(file) and (name := _SHIPPED_NAME.fullmatch(source)):
        if name[1] in shipped_names():
            return shipped_rules(name[1])
        if not os.path.lexists(file):
            raise RulesError(f"{source}: expected a rule file, got no such file", hint=_shipped_hint())
    return parse_rules(read_text(file, source), source)


def shipped_rules(name: str) -> Rules:
    """Load a shipped rule file by its name without suffix ("host", "reference", "gpu"). Raises: RulesError."""
    source = f"rules/{name}.yaml"
    return parse_rules(read_text(_shipped_folder() / f"{name}.yaml", source), source)


def shipped_names() -> tuple[str, ...]:
    """List the names of the shipped rule files."""
    return tuple(sorted(path.stem for path in _shipped_folder().glob("*.yaml")))


def default_rules(machine: Machine, config: ModelConfig, *, experts_packed: bool = True) -> Rules:
    """Choose gpu.yaml where a GPU can hold the dense groups, else host.yaml; `reason` says why."""
    rules = shipped_rules("gpu")
    device = rules.devices.gpu or ""
    gpu = machine.find_gpu(device)
    if gpu is None:
        note = f" ({machine.gpu_note})" if machine.gpu_note else ""
        return _choose("host", f"no GPU found{note}: everything on the host")
    plan = draft_plan(rules, config, machine, experts_packed=experts_packed)
    needed, budget = plan.bytes_on(device), find_budget(device, rules, machine).nbytes
    sizes = f"{format_bytes(needed)} of {format_bytes(budget)}"
    if needed > budget or plan.kv_cache.tokens < min(_MIN_GPU_TOKENS, config.max_position_embeddings):
        return _choose("host", f"{device} ({gpu.name}) is too small, {sizes}: everything on the host")
    return _choose("gpu", f"{device} ({gpu.name}) takes the dense groups, {sizes}")


def _shipped_hint() -> str:
    return f"shipped: {', '.join(f'rules/{name}.yaml' for name in shipped_names())}"


def _choose(name: str, why: str) -> Rules:
    rules = shipped_rules(name)
    return replace(rules, reason=f"{why} ({rules.source})")


def _shipped_folder() -> Path:
    """Find the shipped files: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "rules"
    return installed if installed.is_dir() else package.parent / "rules"

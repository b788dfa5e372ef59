"""Which instruction sets the native kernels have, which this CPU can run, and which one is used: three facts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hybrid_k2.errors import IsaError

ENVIRONMENT = "HYBRID_K2_ISA"


@dataclass(frozen=True)
class IsaFact:
    """Describe one instruction set on this machine.

    `built`: the extension contains it. `supported`: the CPU and the operating system have everything it needs;
    `missing` names what they lack. `chosen`: the engine computes with it.
    """

    name: str
    built: bool
    supported: bool
    missing: tuple[str, ...] = ()
    chosen: bool = False


def choose_isa(facts: Sequence[IsaFact], forced: str | None) -> str:
    """Return the first instruction set that is built and supported, or the forced one.

    Raises: IsaError if the forced one is unknown, not built, or not supported.
    """
    if not forced:
        return next(fact.name for fact in facts if fact.built and fact.supported)
    names = ", ".join(fact.name for fact in facts)
    fact = next((fact for fact in facts if fact.name == forced), None)
    if fact is None:
        raise IsaError(f"{ENVIRONMENT}: expected one of {names}, got {forced}")
    if not fact.built:
        raise IsaError(f"{ENVIRONMENT}={forced}: expected kernels that this build contains, got none for it")
    if not fact.supported:
        raise IsaError(
            f"{ENVIRONMENT}={forced}: expected a CPU with {', '.join(fact.missing)}, got one without",
            hint=f"unset {ENVIRONMENT} to let hybrid-k2 choose",
        )
    return forced


def forced_isa() -> str | None:
    """Return what the environment asks for, or None."""
    return os.environ.get(ENVIRONMENT) or None


def isa_facts() -> list[IsaFact]:
    """List the instruction sets of the native extension, best first; empty where the extension is not installed.

    Raises: IsaError if the environment forces one that cannot be used.
    """
    from hybrid_k2.experts.cpu import native_isas

    facts = native_isas()
    if not facts:
        return []
    chosen = choose_isa(facts, forced_isa())
    return [replace(fact, chosen=fact.name == chosen) for fact in facts]

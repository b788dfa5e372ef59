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

    `built`: the extension contains it, with kernels for these `numerics`. `supported`: the CPU and the operating system
    have everything it needs; `missing` names what they lack. `chosen`: the engine computes with it.
    """

    name: str
    built: bool
    supported: bool
    missing: tuple[str, ...] = ()
    chosen: bool = False
    numerics: tuple[str, ...] = ()

    def offers(self, numerics: str) -> bool:
        """Say whether these numerics can be computed with it here."""
        return self.built and self.supported and numerics in self.numerics


def choose_isa(
    facts: Sequence[IsaFact], forced: str | None, numerics: str = "exact", *, forced_by: str = ENVIRONMENT
) -> str:
    """Return the first instruction set that is built, supported and has these numerics, or the forced one.

    `forced_by` names the variable or option in errors.

    Raises: IsaError if the forced one is unknown, not built, not supported or without these numerics; or none has them.
    """
    offering = [fact.name for fact in facts if fact.offers(numerics)]
    if forced is None:
        if not offering:
            raise IsaError(f"numerics {numerics}: expected kernels that this build contains, got none")
        return offering[0]
    names = ", ".join(fact.name for fact in facts)
    fact = next((fact for fact in facts if fact.name == forced), None)
    if fact is None:
        raise IsaError(f"{forced_by}: expected one of {names}, got {forced!r}")
    if not fact.built:
        raise IsaError(f"{forced_by}={forced}: expected kernels that this build contains, got none for it")
    if not fact.supported:
        raise IsaError(
            f"{forced_by}={forced}: expected a CPU with {', '.join(fact.missing)}, got one without",
            hint=f"leave {forced_by} out to let hybrid-k2 choose",
        )
    if numerics not in fact.numerics:
        raise IsaError(
            f"{forced_by}={forced}: expected kernels for numerics {numerics}, got {' and '.join(fact.numerics)} only",
            hint=f"leave {forced_by} out, or set it to {' or '.join(offering)}"
            if offering
            else "choose other numerics",
        )
    return forced


def forced_isa() -> str | None:
    """Return what the environment asks for, or None."""
    return os.environ.get(ENVIRONMENT) or None


def isa_facts(numerics: str = "exact") -> list[IsaFact]:
    """List the instruction sets of the native extension, best first; empty where the extension is not installed.

    The one that computes these numerics is marked as chosen.

    Raises: IsaError if the environment forces one that cannot be used, or none has these numerics.
    """
    from hybrid_k2.experts.cpu import native_isas

    facts = native_isas()
    if not facts:
        return []
    chosen = choose_isa(facts, forced_isa(), numerics)
    return [replace(fact, chosen=fact.name == chosen) for fact in facts]

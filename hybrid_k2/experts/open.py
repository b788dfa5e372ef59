"""Choose the backend of the routed experts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hybrid_k2.errors import IsaError
from hybrid_k2.experts.base import ExpertsRuntime
from hybrid_k2.experts.isa import ENVIRONMENT, choose_isa, forced_isa
from hybrid_k2.host.threads import NodeThreads

log = logging.getLogger("hybrid_k2")

NUMERICS = ("exact", "fast", "bf16", "reference")

_warned = False


def open_experts(
    numerics: str, threads: int, *, packed: bool = True, nodes: Sequence[NodeThreads] = ()
) -> ExpertsRuntime:
    """Return the runtime for these numerics: native kernels, numba where they are missing, or plain torch.

    `numerics` is exact, fast, bf16 or reference; numba computes in fp32 whatever is asked.
    `nodes` says how the threads are spread over NUMA nodes, for the native kernels; without it they are on one.
    Plain (not INT4) weights are always computed by the reference backend.
    Effects: starts `threads` threads; warns once if the native kernels are missing.
    Raises: ValueError for unknown numerics; IsaError if the environment forces an instruction set that cannot be used,
    or no kernels of this build have the numerics.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"numerics: expected one of {', '.join(NUMERICS)}, got {numerics!r}")
    if numerics == "reference" or not packed:
        from hybrid_k2.experts.reference import ReferenceRuntime

        return ReferenceRuntime()

    from hybrid_k2.experts.cpu import NativeRuntime, native_isas
    from hybrid_k2.native import NATIVE_ERROR

    if facts := native_isas():
        return NativeRuntime(choose_isa(facts, forced_isa(), numerics), threads, numerics, nodes)
    if forced := forced_isa():
        raise IsaError(
            f"{ENVIRONMENT}={forced}: expected the native kernels, got none: {NATIVE_ERROR}",
            hint="install g++ 11 or newer and reinstall hybrid-k2",
        )
    from hybrid_k2.experts.numba_backend import NumbaRuntime

    _warn_once(NATIVE_ERROR)
    return NumbaRuntime(threads)


def _warn_once(reason: str | None) -> None:
    global _warned  # noqa: PLW0603 - the warning is for the process, however many engines it opens
    if not _warned:
        log.warning(
            "native expert kernels are missing (%s); numba computes the experts, about ten times slower. "
            "To build them, install g++ 11 or newer and reinstall hybrid-k2",
            reason,
        )
        _warned = True
